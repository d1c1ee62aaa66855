"""The layout of a safetensors file of a state, read without torch, and whether it is one of this server's model."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mambakit.quoting import cut
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Layout

FORMAT = "mambakit.State/1"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "I16": 2, "BOOL": 1}
_EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # their bits
_MOST_HEADER = 1 << 20
_AGAIN = "export the state again, and send the whole file"


class Place(NamedTuple):
    """Where a tensor is in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class StateFile:
    """A state's file, checked.

    Attributes:
        seen: how many tokens the tensors have read.
        pending: tokens that come after those and are not read yet.
        tokens: all tokens of the text, those included; None where the file does not have them.
    """

    seen: int
    pending: array[int]
    tokens: array[int] | None

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.seen + len(self.pending)

    @property
    def digest(self) -> str:
        """A hash of the text's tokens; "" where they are not known."""
        return "" if self.tokens is None else digest_of(self.tokens)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * _SIZES[dtype]


def digest_of(tokens: array[int]) -> str:
    """A hash of tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).hexdigest()


def header_of(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, Place]]:
    """(metadata, tensors by name) of a safetensors file.

    Raises:
        ValueError: it is none, or is not whole.
    """
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > _MOST_HEADER or 8 + length > len(data):
        raise ValueError(f"its header is said to have {length:,} bytes, and {len(data) - 8:,} follow")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: Place(str(one["dtype"]), tuple(map(int, one["shape"])), *map(int, one["data_offsets"]))
            for name, one in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no strings")
    at = 0
    for name, one in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if one.begin != at or min(one.shape, default=0) < 0 or one.dtype not in _SIZES:
            raise ValueError(f"its tensor {cut(name)!r} cannot be read")
        at += one.nbytes
        if one.end != at:
            raise ValueError(f"its tensor {cut(name)!r} has another size than its shape")
    first = 8 + length
    if first + at != len(data):
        raise ValueError(f"it has {len(data):,} bytes, and its header says {first + at:,}")
    moved = {name: one._replace(begin=first + one.begin, end=first + one.end) for name, one in tensors.items()}
    return metadata, moved


def check(data: bytes | memoryview, layout: Layout, *, kept: bool = False) -> StateFile:
    """Read a state's file.

    Args:
        kept: whether it is what was written when the state was kept: its tokens have been checked then, which takes as
            long as the text is long.

    Raises:
        ApiError: it is no safetensors file, not whole, no state of one text, or one of another model.
    """
    try:
        metadata, tensors = header_of(data)
    except ValueError as error:
        raise ApiError(400, f"the file is not a whole safetensors file: {error}; {_AGAIN}") from error
    if metadata.get("format") != FORMAT:
        raise ApiError(
            400, f"the file is no saved state (its format is {cut(str(metadata.get('format')))!r}, not {FORMAT!r}); "
            "send one that GET /v1/states/{id}/export or mambakit generate --save-state made",
        )  # fmt: skip
    if metadata.get("fingerprint") != layout.fingerprint:
        raise ApiError(
            409, "the state is of a model of other weights or another configuration; a state is of use with the model "
            "that read it alone: serve that one, or read the text again with this one",
            code="state_of_another_model",
        )  # fmt: skip
    for name, (dtype, shape) in layout.tensors.items():
        found = tensors.get(name)
        if found is None or found[:2] != (dtype, shape):
            is_it = "missing" if found is None else f"{found[0]} {list(found[1])}"
            raise ApiError(
                400, f"the file's {name} is {is_it}; it must be {dtype} {list(shape)}, of one text and of the dtype "
                "that this server runs in",
            )  # fmt: skip
        if not kept and not _is_finite(data, found):
            raise ApiError(
                400, f"the file's {name} has numbers that are NaN or infinite, after which no token can be chosen; "
                "read the text again",
            )  # fmt: skip
    more = set(tensors) - set(layout.tensors) - {"pending", "tokens"}
    if more:
        raise ApiError(400, f"the file has a tensor {cut(min(more))!r}, which no state has; {_AGAIN}")
    seen = metadata.get("seen_tokens", "")
    if not seen.isdecimal() or len(seen) > 15:
        raise ApiError(400, f"the file's seen_tokens is {cut(seen)!r}, not a number of tokens; {_AGAIN}")
    pending = _ids(data, tensors, "pending", layout.vocab_size)
    tokens = _ids(data, tensors, "tokens", None if kept else layout.vocab_size) if "tokens" in tensors else None
    if tokens is not None and (
        len(tokens) != int(seen) + len(pending) or (pending and tokens[-len(pending) :] != pending)
    ):
        raise ApiError(400, f"the file's tokens are not those that it has read; {_AGAIN}")
    return StateFile(int(seen), pending, tokens)


def _is_finite(data: bytes | memoryview, place: Place) -> bool:
    """Whether a tensor has neither NaN nor infinity: numbers whose exponent is all ones."""
    exponent = _EXPONENTS.get(place.dtype)
    if exponent is None:
        return True
    numbers = np.frombuffer(data, f"<u{_SIZES[place.dtype]}", math.prod(place.shape), place.begin)
    return not bool((numbers & exponent == exponent).any())


def _ids(data: bytes | memoryview, tensors: dict[str, Place], name: str, vocab_size: int | None) -> array[int]:
    dtype, shape, begin, _ = tensors.get(name, Place("", (), 0, 0))
    if dtype not in ("I64", "I32") or len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise ApiError(400, f"the file's {name} are no token ids of one text; {_AGAIN}")
    ids = np.frombuffer(data, "<i8" if dtype == "I64" else "<i4", math.prod(shape), begin)
    if vocab_size is not None and len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ApiError(400, f"the file's {name} are not of the model's vocabulary, 0 to {vocab_size - 1}; {_AGAIN}")
    # By its bytes: an array made of numbers one by one takes milliseconds for a long text, at every next turn.
    return array("q", ids.astype("=i8").tobytes())
