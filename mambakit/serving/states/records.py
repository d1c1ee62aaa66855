"""What is known of a kept state: one small JSON file each, written durably."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mambakit.serving.states.blobs import delete_abandoned, not_written, sync_folder
from mambakit.writing import replacing

_ID = re.compile(r"state_[0-9a-f]{24}")
_MOST = 1 << 53  # of a number in a record


def new_id() -> str:
    return f"state_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class StateRecord:
    """
    Attributes:
        id: by which clients name it.
        owner: the key that made it, as `AccessRules.holder` names keys.
        blob: SHA-256 of its file.
        bytes: of that file.
        tokens: how many tokens of text it stands after.
        digest: a hash of those tokens; "" where they are not known, as in some imported files.
        origin: "prompt", "completion", "chat", "score", "fork", "branch" or "import".
        parent: the id of the state that it was made from; "" for none.
        created, expires: seconds since 1970; None: it does not expire.
        fingerprint: of the model that read it.
        metadata: the client's own.
    """

    owner: str
    blob: str
    bytes: int
    tokens: int
    fingerprint: str
    digest: str = ""
    origin: str = "prompt"
    parent: str = ""
    expires: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=new_id)

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now

    @property
    def body(self) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id, "object": "state", "created": int(self.created), "tokens": self.tokens, "bytes": self.bytes,
            "origin": self.origin, "parent": self.parent or None,
            "expires_at": None if self.expires is None else int(self.expires), "sha256": self.blob,
            "can_branch": bool(self.digest), "metadata": self.metadata,
        }  # fmt: skip


def parse(id: str, text: str) -> StateRecord | None:
    """The record of a file's text; None where it is damaged, or another's."""
    try:
        found = json.loads(text)
        record = StateRecord(**{one.name: found[one.name] for one in fields(StateRecord)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if record.id == id and _is_sound(record) else None


def _is_sound(record: StateRecord) -> bool:
    """Whether each field is of its type: a file that somebody has changed must not stop the server from starting."""
    texts = (record.owner, record.fingerprint, record.digest, record.origin, record.parent)
    times = (record.created,) if record.expires is None else (record.created, record.expires)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(record.blob, str)
        and re.fullmatch("[0-9a-f]{64}", record.blob) is not None
        and all(type(count) is int and 0 <= count < _MOST for count in (record.bytes, record.tokens))
        and all(type(moment) in (int, float) and abs(moment) < _MOST for moment in times)
        and isinstance(record.metadata, dict)
        and all(isinstance(one, str) for pair in record.metadata.items() for one in pair)
    )


class Records:
    """A folder of them, made with the first."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def write(self, record: StateRecord) -> None:
        """Durably.

        Raises:
            ApiError: the disk is full, or cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(record.id)) as temporary:
                temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
            sync_folder(self.folder)
        except OSError as error:
            raise not_written(error, self.folder) from error

    def read(self, id: str) -> StateRecord | None:
        """None where there is none, or where its file is damaged."""
        if _ID.fullmatch(id) is None:
            return None
        try:
            return parse(id, self._path(id).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def delete(self, id: str) -> None:
        with contextlib.suppress(OSError):
            self._path(id).unlink()
            sync_folder(self.folder)

    def has(self, id: str) -> bool:
        """False only where it is known that there is none."""
        try:
            self._path(id).stat()
        except FileNotFoundError:
            return False
        except OSError:  # as of a file system that does not answer
            return True
        return True

    def ids(self) -> Iterator[str]:
        """Of all records. Raises an OSError where the folder cannot be listed. Files that were never finished are
        deleted."""
        if not self.folder.is_dir():
            return
        for name in os.listdir(self.folder):
            id, _, ending = name.partition(".")
            if ending == "json" and _ID.fullmatch(id):
                yield id
            else:
                delete_abandoned(self.folder / name)
