"""The kernels' argument structures: the same fields in the same order as the `struct`s of the native.cpp files."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops._backends import memory
from mambakit.ops._backends.memory import FLOAT32, FLOAT32_OR_BFLOAT16, INT32

__all__ = [
    "FLOAT32", "FLOAT32_OR_BFLOAT16", "INT32", "address", "address_of_rows", "as_float32", "channels_adjacent", "check",
    "is_half", "row_strides", "structure",
]  # fmt: skip


def structure(name: str, pointers: str, integers: str, doubles: str = ""):
    """A ctypes structure: pointers, then 64-bit integers, then doubles."""
    fields: list[tuple[str, type]] = [(f, ctypes.c_void_p) for f in pointers.split()]
    fields += [(f, ctypes.c_int64) for f in integers.split()]
    fields += [(f, ctypes.c_double) for f in doubles.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def address(tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], count: int) -> int | None:
    """`memory.address` on the CPU; null where there is no tensor."""
    return None if tensor is None else memory.address(tensor, dtypes, count)


def address_of_rows(tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> int | None:
    """`memory.address_of_rows` on the CPU; null where there is no tensor."""
    return None if tensor is None else memory.address_of_rows(tensor, dtypes, shape)


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over the batch and over tokens of a (b, l, channels) tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def channels_adjacent(tensor: Tensor) -> Tensor:
    """The kernels read channels as neighbours in memory; any other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def is_half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def check(code: int) -> None:
    """Raise for a kernel's return code."""
    if code:
        raise MemoryError(
            "mambakit's native kernel could not allocate its scratch memory; free memory or use fewer threads"
        )


def as_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
