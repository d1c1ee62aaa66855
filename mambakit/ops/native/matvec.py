"""The Python side of the linear kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.ops.native import library
from mambakit.ops.native.structures import address, as_float32, check, structure

if TYPE_CHECKING:
    from mambakit.ops.linear.api import PackedWeight

Arguments = structure(
    "Arguments", "x weight scales bias y starts columns values", "b in_ out group threads x_stride y_stride"
)
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "lossless32": 4, "lossless16": 5}


def arguments(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> ctypes.Structure:
    """One product: x (b, in) and y (b, out) float32 with adjacent columns, bias (out,) float32."""
    starts, columns, values = weight.exceptions or (None, None, None)
    return Arguments(
        address(x), address(weight.data), address(weight.scales), address(bias), address(y),
        address(starts), address(columns), address(values), x.shape[0],
        weight.in_features, weight.out_features, weight.group, library.threads(), x.stride(0), y.stride(0),
    )  # fmt: skip


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for a few rows of x (..., in)."""
    flat = x.reshape(-1, weight.in_features).float().contiguous()
    y = torch.empty(flat.shape[0], weight.out_features)
    bias = as_float32(bias)
    call = arguments(flat, weight, bias, y)
    check(library.kernel("linear")(ctypes.byref(call), ctypes.c_int64(KINDS[weight.format])))
    return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() != 2 else y.to(x.dtype)


def widen(weight: PackedWeight) -> Tensor:
    """The weight (out, in) in float32."""
    if weight.format in ("float32", "bfloat16"):
        return weight.data.float()
    y = torch.empty(weight.out_features, weight.in_features)
    call = arguments(y[:0], weight, None, y)
    check(library.kernel("widen")(ctypes.byref(call), ctypes.c_int64(KINDS[weight.format])))
    return y
