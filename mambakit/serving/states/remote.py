"""States in a file system that fsspec knows (s3://, gs://, ...): what `blobs` and `records` are in a folder.

An object is written whole or not at all, and is durable when the write returns: that is what such stores promise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from mambakit.quoting import brief
from mambakit.serving.errors import ApiError
from mambakit.serving.states.records import StateRecord, parse

_T = TypeVar("_T")
_SUFFIX = ".safetensors"
_DIGEST = re.compile(r"([0-9a-f]{64})\.safetensors")
_ID = re.compile(r"(state_[0-9a-f]{24})\.json")
# What file systems raise: most wrap their own errors as OSError, and some do not.
_ERRORS = (OSError, ValueError, RuntimeError)


def is_url(folder: object) -> bool:
    return "://" in str(folder)


class RemoteFolder:
    """The objects below a URL.

    Raises:
        ValueError: fsspec does not know it, or a package for it is missing.
    """

    def __init__(self, url: str):
        import fsspec

        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{brief(url)} cannot be used ({error}); name a folder, or install what it needs"
            ) from None
        self._root = self._root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """None where there is none."""
        try:
            return bytes(self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        with contextlib.suppress(NotImplementedError):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._system.pipe_file(path, data)

    def delete(self, name: str) -> None:
        with contextlib.suppress(*_ERRORS):
            self._system.rm_file(f"{self._root}/{name}")
            self._forget()

    def size(self, name: str) -> int | None:
        with contextlib.suppress(*_ERRORS):
            self._forget()
            return int(self._system.info(f"{self._root}/{name}")["size"])
        return None

    def changed(self, name: str) -> float:
        """When it was written, in seconds since 1970. Raises an OSError where there is none."""
        return float(self._system.modified(f"{self._root}/{name}").timestamp())

    def has(self, name: str) -> bool:
        """False only where it is known that there is none."""
        try:
            self._forget()
            self._system.info(f"{self._root}/{name}")
        except FileNotFoundError:
            return False
        except _ERRORS:
            return True
        return True

    def names(self) -> list[str]:
        """Of every object. Raises an OSError where they cannot be listed."""
        self._forget()
        try:
            found = self._system.find(self._root)
        except FileNotFoundError:
            return []
        except (ValueError, RuntimeError) as error:
            raise OSError(str(error)) from error
        return [path[len(self._root) :].lstrip("/") for path in found]

    def _forget(self) -> None:
        """Other servers write here, too: nothing is taken from a listing that was made before."""
        self._system.invalidate_cache()


def _kept(write: Callable[[], _T]) -> _T:
    try:
        return write()
    except _ERRORS as error:
        message = f"the state could not be kept ({type(error).__name__}: {error}); send the request again"
        raise ApiError(507, message, code="state_not_kept") from error


class RemoteBlobs:
    """As `Blobs`."""

    def __init__(self, url: str):
        self._folder = RemoteFolder(url)

    def _name(self, digest: str) -> str:
        return f"{digest[:2]}/{digest}{_SUFFIX}"

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        _kept(lambda: self._folder.write(self._name(digest), data))
        return digest

    def get(self, digest: str) -> bytes:
        try:
            data = self._folder.read(self._name(digest))
        except _ERRORS as error:
            message = f"the state's file cannot be read ({type(error).__name__}: {error}); try again"
            raise ApiError(503, message, code="state_unreachable", retry_after=5) from error
        if data is None:
            raise ApiError(410, "the state's file is gone; make the state again", code="state_damaged")
        if hashlib.sha256(data).hexdigest() != digest:
            self.delete(digest)
            message = "the state's file is damaged (it is not what was written); make the state again"
            raise ApiError(410, message, code="state_damaged")
        return data

    def size(self, digest: str) -> int | None:
        return self._folder.size(self._name(digest))

    def changed(self, digest: str) -> float:
        return self._folder.changed(self._name(digest))

    def delete(self, digest: str) -> None:
        self._folder.delete(self._name(digest))

    def touch(self, digest: str) -> None:
        """Objects cannot be touched."""

    def digests(self) -> Iterator[str]:
        for name in self._folder.names():
            if found := _DIGEST.fullmatch(name.rpartition("/")[2]):
                yield found[1]


class RemoteRecords:
    """As `Records`."""

    def __init__(self, url: str):
        self._folder = RemoteFolder(url)

    def write(self, record: StateRecord) -> None:
        content: dict[str, Any] = asdict(record)
        _kept(lambda: self._folder.write(f"{record.id}.json", json.dumps(content).encode()))

    def read(self, id: str) -> StateRecord | None:
        if _ID.fullmatch(f"{id}.json") is None:
            return None
        with contextlib.suppress(*_ERRORS):
            content = self._folder.read(f"{id}.json")
            return None if content is None else parse(id, content.decode())
        return None

    def delete(self, id: str) -> None:
        self._folder.delete(f"{id}.json")

    def has(self, id: str) -> bool:
        return self._folder.has(f"{id}.json")

    def ids(self) -> Iterator[str]:
        for name in self._folder.names():
            if found := _ID.fullmatch(name):
                yield found[1]
