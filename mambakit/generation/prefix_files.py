"""The files of a prefix cache: ``<folder>/<model>/<position>-<digest>.safetensors``.

Several processes may use one folder. A file is renamed into place once it is whole, its modification time is that of
its last use, and any process may delete it at any time.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.generation.prefix_keys import PrefixKey
from mambakit.generation.state import write_tensors
from mambakit.reading import open_safetensors

_FORMAT = "mambakit.PrefixCache/1"
_NAME = re.compile(r"\d+-[0-9a-f]{64}\.safetensors")
# A temporary file this old (seconds) belongs to a process that was killed while it wrote.
_ABANDONED = 3600


class PrefixFiles:
    """States in a folder, one file each. The folder is made with the first file."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)

    def keys(self, model: str) -> set[PrefixKey]:
        """Those of a model's files."""
        return {_key_of(file) for file in self._files(model)}

    def touch(self, key: PrefixKey) -> None:
        """Note a use, for all processes to see."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(key))

    def write(self, key: PrefixKey, tensors: dict[str, Tensor], budget: int) -> int:
        """Write a state unless it is there, then delete the model's files used longest ago, beyond ``budget`` bytes.

        Returns:
            How many files were deleted.
        """
        path = self._path(key)
        if path.exists() or sum(t.nbytes for t in tensors.values()) > budget:
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = {name: t.cpu().contiguous() for name, t in tensors.items()}
        write_tensors(path, contents, {"format": _FORMAT, "key": _text_of(key)})
        return _trim(path, budget)

    def read(self, key: PrefixKey, names: Sequence[str], device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of these names, on ``device``; None where the file is gone or damaged, with a warning then."""
        path = self._path(key)
        try:
            with open_safetensors(path) as file:
                if (file.metadata() or {}).get("key") != _text_of(key):
                    raise CheckpointError("it holds the state of other tokens")
                return {name: file.get_tensor(name).to(device, copy=True) for name in names}
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

    def _path(self, key: PrefixKey) -> Path:
        return self._folder / key.model / f"{key.position}-{key.digest}.safetensors"

    def _files(self, model: str) -> list[Path]:
        folder = self._folder / model
        return [file for file in folder.iterdir() if _NAME.fullmatch(file.name)] if folder.is_dir() else []


def _text_of(key: PrefixKey) -> str:
    return "-".join(map(str, key))


def _key_of(file: Path) -> PrefixKey:
    position, _, digest = file.stem.partition("-")
    return PrefixKey(file.parent.name, int(position), digest)


def _trim(newest: Path, budget: int) -> int:
    """Delete the files used longest ago until the rest fits; how many. Another process may be doing the same."""
    found, deleted = [], 0
    for file in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if file.suffix == ".safetensors":
                found.append((file == newest, status.st_mtime_ns, status.st_size, file))
            elif time.time() - status.st_mtime > _ABANDONED:
                file.unlink(missing_ok=True)
    total = sum(size for _, _, size, _ in found)
    for _, _, size, file in sorted(found):
        if total <= budget:
            break
        file.unlink(missing_ok=True)
        total -= size
        deleted += 1
    return deleted
