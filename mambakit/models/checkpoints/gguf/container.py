"""GGUF's container: a header of metadata and of tensors' places, then the tensors' bytes, memory-mapped.

The layout (ggml's specification of GGUF), little endian: magic, version, number of tensors, number of metadata values;
each value a key, a type and its bytes; each tensor a name, its dimensions (the fastest first), a type and an offset
into the data, which begins at the next multiple of ``general.alignment``.
Every length is checked against what is left of the file before anything of that size is made, so a damaged or hostile
file raises a `CheckpointError`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.gguf.types import BlockType, block_type, named
from mambakit.quoting import brief
from mambakit.reading import require_whole
from mambakit.writing import replacing

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16
# Types of metadata values: the letter of struct, or None.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorPlace:
    """A tensor as the header describes it.

    Attributes:
        shape: as torch has it, the slowest dimension first.
        type: how its numbers are stored.
        start: of its bytes in the file.
    """

    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.numbers * self.type.bytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors' bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]

    def bytes_of(self, name: str) -> np.ndarray:
        """The bytes of a tensor, mapped from the file: (nbytes,) uint8, private to this process when written to."""
        place = self.tensors[name]
        if not place.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "c", place.start, (place.nbytes,))


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        CheckpointError: the file is damaged, or of a version that is not read.
    """
    require_whole(path)
    state = path.stat()
    return _read_header(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_header(path: Path, size: int, _changed: int) -> Header:
    reader = _Reader(path, size)
    if reader.take(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}; fetch it again")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} is big-endian GGUF; mambakit reads little-endian files: convert it again")
    if version not in (2, VERSION):
        raise CheckpointError(f"{path} is GGUF version {version}; mambakit reads 2 and {VERSION}: convert it again")
    tensors, values = reader.number("Q"), reader.number("Q")
    reader.require(24 * tensors + 12 * values, f"{tensors} tensors and {values} values")  # the least that each takes
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = reader.string("a key", _LONGEST_NAME)
        if key in metadata:
            raise reader.damaged(f"it has {brief(key)} twice")
        metadata[key] = reader.value(key)
    described = _describe(reader, tensors)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 16:
        raise reader.damaged(f"general.alignment is {brief(alignment)}, no multiple of 8 from 8 to 65536")
    data = -(-reader.position // alignment) * alignment
    for name, (shape, type_, offset) in described.items():
        place = TensorPlace(shape, type_, data + offset)
        if offset % alignment:
            raise reader.damaged(f"tensor {brief(name)} begins at {offset}, no multiple of {alignment}")
        if place.start + place.nbytes > size:
            raise reader.damaged(
                f"tensor {brief(name)} ends at byte {place.start + place.nbytes:,} of a file of {size:,}"
            )
        described[name] = place
    return Header(path, metadata, described)


def _describe(reader: _Reader, count: int) -> dict[str, Any]:
    """Name -> shape, type and offset of every tensor."""
    described: dict[str, Any] = {}
    for _ in range(count):
        name = reader.string("a tensor's name", _LONGEST_NAME)
        if name in described:
            raise reader.damaged(f"it has tensor {brief(name)} twice")
        dimensions = reader.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise reader.damaged(f"tensor {brief(name)} has {dimensions} dimensions, at most {_MOST_DIMENSIONS} exist")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        if math.prod(shape) >= 1 << 63:
            raise reader.damaged(f"tensor {brief(name)} has shape {shape}")
        number = reader.number("I")
        type_ = block_type(number)
        if type_ is None:
            raise CheckpointError(
                f"{reader.path}: tensor {brief(name)} is of ggml's type {number}; mambakit reads {named()}: "
                "quantise the original again to one of them"
            )
        if shape and shape[-1] % type_.numbers:
            raise reader.damaged(
                f"tensor {brief(name)} has rows of {shape[-1]} numbers, {type_.name} blocks have {type_.numbers}"
            )
        described[name] = (shape, type_, reader.number("Q"))
    return described


class _Reader:
    """Takes values from the front of a file; more than is left of it raises."""

    def __init__(self, path: Path, size: int):
        self.path, self.size, self.position = path, size, 0
        self._bytes = np.memmap(path, np.uint8, "r")

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged ({what}); fetch it again")

    def require(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.damaged(
                f"{what} at byte {self.position:,} would take {count:,} bytes, {self.size - self.position:,} are left"
            )

    def take(self, count: int, what: str = "a value") -> bytes:
        self.require(count, what)
        start, self.position = self.position, self.position + count
        return self._bytes[start : self.position].tobytes()

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))
        return value

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise self.damaged(f"{what} at byte {self.position:,} has {length:,} bytes")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} at byte {self.position:,} is not UTF-8") from error

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string(brief(key))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"{brief(key)} is of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self.require(8 * count, brief(key))
            return [self.string(brief(key)) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"{brief(key)} is an array of type {kind}")
        letter = _SCALARS[kind]
        raw = self.take(struct.calcsize("<" + letter) * count if count < 1 << 60 else count, brief(key))
        return list(struct.unpack(f"<{count}{letter}", raw))


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type's letter (as of struct), where Python's own types do not say it."""

    letter: str
    value: Any


Writable = tuple[tuple[int, ...], BlockType, Callable[[], bytes]]
"""A tensor's shape and type, and what gives its bytes."""


def write_file(path: Path, metadata: dict[str, Any], tensors: dict[str, Writable]) -> None:
    """Write a GGUF file whole, or not at all.

    Args:
        metadata: str, bool, `Typed`, or a list of one of these; an int is a uint32 and a float a float32.
        tensors: by name; each gives its bytes when it is its turn.
    """
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _value(value)]
    offset = 0
    for name, (shape, type_, _) in tensors.items():
        header += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], type_.number, offset)]
        offset += _aligned(TensorPlace(shape, type_, 0).nbytes)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(header)
        file.write(bytes(_aligned(file.tell()) - file.tell()))
        for shape, type_, give in tensors.values():
            raw = give()
            assert len(raw) == TensorPlace(shape, type_, 0).nbytes
            file.write(raw)
            file.write(bytes(_aligned(len(raw)) - len(raw)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _STRING
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_raw_items(value))
    return struct.pack("<I", _kind(value)) + b"".join(_raw_items([value]))


def _kind(value: Any) -> int:
    letters = {letter: kind for kind, letter in _SCALARS.items()}
    return _STRING if isinstance(value, str) else letters[_letter(value)]


def _letter(value: Any) -> str:
    if isinstance(value, Typed):
        return value.letter
    return {bool: "?", int: "I", float: "f"}[type(value)]


def _raw_items(values: Iterable[Any]) -> Iterable[bytes]:
    for value in values:
        if isinstance(value, str):
            yield _text(value)
        else:
            yield struct.pack("<" + _letter(value), value.value if isinstance(value, Typed) else value)
