"""The files of a prefix cache: ``<folder>/<model>/<position>-<digest>[-<owner>].safetensors``.

Several processes may use one folder. A file is renamed into place once it is whole, its modification time is that of
its last use, and any process may delete it at any time. Beyond the budget, files of the owner with the most bytes go
first, so that one owner's prompts do not push out another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.generation.prefix_keys import PrefixKey
from mambakit.generation.prefix_snapshot import LOGITS, bytes_of
from mambakit.generation.state import write_tensors
from mambakit.quoting import quoted
from mambakit.reading import open_safetensors

_FORMAT = "mambakit.PrefixCache/2"
# Two, so that versions that know no logits can read the states beside them.
_SHA256, _LOGITS_SHA256 = "sha256", "logits_sha256"
_NAME = re.compile(r"(\d+)-([0-9a-f]{64})(?:-([0-9a-f]+))?\.safetensors")
# A listing is kept while the folder does not change. Changes within so many seconds may have the same time stamp.
_SETTLED = 1.0
# So many times the size of a file are left free on the disk: a full one would refuse the states that clients keep, and
# what is read again at worst must not stand in their way.
_SPARE = 16
# A temporary file this old (seconds) belongs to a process that was killed while it wrote.
_ABANDONED = 3600


class PrefixFiles:
    """States in a folder, one file each. The folder is made with the first file.

    Raises:
        ValueError: an empty path, or one that leads through a file.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = path = Path(folder)
        existing = next(one for one in (path, *path.absolute().parents) if one.exists())
        if not os.fspath(folder) or not existing.is_dir():
            what = f"{existing} is a file" if os.fspath(folder) else "there is no name"
            raise ValueError(f"folder is {quoted(os.fspath(folder))}: {what}; name a folder, or a place for a new one")
        self._listed: dict[str, tuple[int, dict[PrefixKey, Path]]] = {}  # by model: time of the folder, its files

    def keys(self, model: str) -> dict[PrefixKey, Path]:
        """A model's files."""
        folder = self._folder / model
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        known = self._listed.get(model)
        if known is not None and known[0] == changed:
            return known[1]
        found = {_key_of(file): file for file in self._files(model)}
        if time.time() - changed / 1e9 > _SETTLED:
            self._listed[model] = changed, found
        return found

    def touch(self, path: Path) -> None:
        """Note a use, for all processes to see."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)

    def write(self, key: PrefixKey, tensors: dict[str, Tensor], budget: int, owner: str = "") -> int:
        """Write a state, on the host, unless it is there; one with logits also over one without.

        Then files of the model beyond ``budget`` bytes are deleted: of the owner with the most bytes the one used
        longest ago, until the rest fits. Files are deleted before where the disk is nearly full, and where that is not
        enough nothing is written.

        Returns:
            How many files were deleted.
        """
        path, size, deleted = self._path(key, owner), bytes_of(tensors), 0
        if size > budget or (path.exists() and (LOGITS not in tensors or _has_logits(path))):
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        missing = (1 + _SPARE) * size - shutil.disk_usage(path.parent).free
        if missing > 0:
            deleted, freed = _trim(path, budget, missing)
            if freed < missing:
                return deleted
        contents = {name: t.contiguous() for name, t in tensors.items()}
        metadata = {"format": _FORMAT, "key": _text_of(key)}
        states = {name: t for name, t in contents.items() if name != LOGITS}
        metadata[_SHA256] = _digest(states)
        if LOGITS in contents:
            metadata[_LOGITS_SHA256] = _digest({LOGITS: contents[LOGITS]})
        write_tensors(path, contents, metadata)
        return deleted + _trim(path, budget)[0]

    def read(
        self,
        path: Path,
        key: PrefixKey,
        names: Sequence[str],
        vocab_size: int,
        device: torch.device,
        *,
        with_logits: bool = False,
    ) -> dict[str, Tensor] | None:
        """The states of these names, and the logits (1, ``vocab_size``) if the file has them, on ``device``.

        None where the file is gone or damaged, with a warning then, and where it has no logits but must have them.
        """
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != _text_of(key):
                    raise CheckpointError("it holds the state of other tokens")
                if with_logits and _LOGITS_SHA256 not in metadata:
                    return None
                tensors = {name: file.get_tensor(name) for name in names}
                logits = {LOGITS: file.get_tensor(LOGITS)} if _LOGITS_SHA256 in metadata else {}
            if metadata.get(_SHA256) != _digest(tensors):
                raise CheckpointError("its contents are not those that were written")
            if logits and metadata[_LOGITS_SHA256] != _digest(logits):
                raise CheckpointError("its logits are not those that were written")
            if logits and not _are_logits(logits[LOGITS], vocab_size):
                raise CheckpointError(f"its logits are not of a vocabulary of {vocab_size}")
            return {name: tensor.to(device, copy=True) for name, tensor in {**tensors, **logits}.items()}
        except FileNotFoundError:  # deleted by another process since the folder was listed
            return None
        except CheckpointError as error:
            warnings.warn(f"{path} is not usable ({error}); it is deleted, and the prompt read again", stacklevel=2)
            path.unlink(missing_ok=True)
            return None

    def clear(self, model: str) -> None:
        """Delete a model's files."""
        for file in self._files(model):
            file.unlink(missing_ok=True)

    def _path(self, key: PrefixKey, owner: str) -> Path:
        mark = f"-{hashlib.sha256(owner.encode()).hexdigest()[:16]}" if owner else ""
        return self._folder / key.model / f"{key.position}-{key.digest}{mark}.safetensors"

    def _files(self, model: str) -> list[Path]:
        folder = self._folder / model
        return [file for file in folder.iterdir() if _NAME.fullmatch(file.name)] if folder.is_dir() else []


def _has_logits(path: Path) -> bool:
    """Whether the file has logits; one that cannot be read has none."""
    try:
        with open_safetensors(path) as file:
            return _LOGITS_SHA256 in (file.metadata() or {})
    except (CheckpointError, FileNotFoundError):
        return False


def _are_logits(logits: Tensor, vocab_size: int) -> bool:
    return logits.shape == (1, vocab_size) and logits.dtype in (torch.float32, torch.float64)


def _text_of(key: PrefixKey) -> str:
    return "-".join(map(str, key))


def _key_of(file: Path) -> PrefixKey:
    found = _NAME.fullmatch(file.name)
    assert found is not None, "it is one of `_files`"
    return PrefixKey(file.parent.name, int(found[1]), found[2])


def _owner_of(file: Path) -> str:
    found = _NAME.fullmatch(file.name)
    return "" if found is None else found[3] or ""


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _trim(newest: Path, budget: int, missing: int = 0) -> tuple[int, int]:
    """Delete files until the rest fits, and so many bytes are freed; their number and bytes. Another process may be
    doing the same."""
    deleted = freed = 0
    by_owner: dict[str, list[tuple[bool, int, int, Path]]] = {}
    for file in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if file.suffix == ".safetensors":
                one = (file == newest, status.st_mtime_ns, status.st_size, file)
                by_owner.setdefault(_owner_of(file), []).append(one)
            elif time.time() - status.st_mtime > _ABANDONED:
                file.unlink(missing_ok=True)
    for files in by_owner.values():
        files.sort(reverse=True)  # the one to delete first is last
    bytes_of = {owner: sum(size for _, _, size, _ in files) for owner, files in by_owner.items()}
    while (left := sum(bytes_of.values())) > budget or (left and freed < missing):
        owner = max(bytes_of, key=lambda one: bytes_of[one])
        _, _, size, file = by_owner[owner].pop()
        file.unlink(missing_ok=True)
        bytes_of[owner] -= size
        deleted, freed = deleted + 1, freed + size
    return deleted, freed
