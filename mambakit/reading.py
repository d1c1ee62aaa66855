"""Reading files: JSON, safetensors, torch's pickles. Each is checked first: it exists, is whole, is not a Git LFS
pointer, and is of the format that its name says. Pickled code is never executed.

A file with wrong contents raises a `CheckpointError` that names the file and the remedy.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError, UsageError

_FETCH = "fetch it again"
_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
# torch.save before 1.6: a pickle that begins with protocol 2 and this magic number.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# What torch's restricted unpickler raises over files cut short or with bytes overwritten.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def require_whole(file: str | os.PathLike, remedy: str = _FETCH) -> None:
    """CheckpointError if ``file`` is empty, a folder, unreadable or a Git LFS pointer.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    try:
        with open(path, "rb") as opened:
            start = opened.read(len(_POINTER))
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a folder, not a file" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} {what}; {remedy}") from error
    if start == _POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its folder"
        )
    if not start:
        raise CheckpointError(f"{path} is truncated or damaged (it is empty); {remedy}")


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_json(path: Path, remedy: str = _FETCH) -> dict[str, Any]:
    """The object that a JSON file holds."""
    require_whole(path, remedy)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers too long, brackets too deep
        raise CheckpointError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; {remedy}")
    return value


def require_unicode(text: str, what: str) -> None:
    """UsageError for half of a surrogate pair, which JSON can write and no tokenizer reads.

    Args:
        what: the place of ``text``, for the error.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} has half of a surrogate pair at {error.start}; write whole characters") from error


# -- safetensors -------------------------------------------------------------------------------------------------------


@contextmanager
def open_safetensors(file: str | os.PathLike, remedy: str = _FETCH) -> Iterator[Any]:
    """safetensors' `safe_open` on the CPU."""
    from safetensors import SafetensorError, safe_open

    require_whole(file, remedy)
    try:
        with safe_open(file, "pt", device="cpu") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); {remedy}") from error


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor, without reading safetensors' data."""
    require_whole(file)
    if file.suffix != ".safetensors":
        return {name: (tuple(t.shape), t.dtype) for name, t in read_bin(file).items()}
    with open_safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, a safe_open is no dict
        described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    for name, (_, dtype) in described.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {dtype}; mambakit reads {', '.join(DTYPES)}")
    return {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in described.items()}


def read_file(file: Path, remedy: str = _FETCH) -> dict[str, Tensor]:
    """Every tensor of a file, by name."""
    if file.suffix != ".safetensors":
        return read_bin(file)
    with open_safetensors(file, remedy) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


# -- torch.save's files ------------------------------------------------------------------------------------------------


def read_bin(file: Path) -> dict[str, Tensor]:
    """A pickled state dict: tensors by name."""
    state = read_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} is not a state dict of tensors; save model.state_dict() alone")
    return state


def read_pickle(file: Path, remedy: str = _FETCH) -> Any:
    """A file of torch.save, read with weights_only=True: tensors, numbers and containers, never code."""
    require_whole(file, remedy)
    with open(file, "rb") as opened:
        start = opened.read(len(_LEGACY))
    zipped = start[: len(_ZIP)] == _ZIP
    if not zipped and start != _LEGACY:
        raise CheckpointError(f"{file} was not written by torch.save, or its start is damaged; {remedy}")
    try:
        if zipped and not zipfile.is_zipfile(file):
            raise EOFError("its end is missing")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds pickled code, or is damaged, and was not opened further; get the weights as safetensors, or "
            "from a source you trust"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); {remedy}") from error
