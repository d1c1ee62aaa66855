"""The launcher of the CPU's linear kernels: outputs, strides and addresses."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops._backends.memory import empty
from mambakit.ops._backends.structures import FLOAT32, INT32, address, address_of_rows, as_float32, check, structure
from mambakit.ops.linear.packed import PackedWeight

# Beyond this many rows of x the product is bound by arithmetic, and torch's matrix product is faster.
MOST_ROWS = 16

Arguments = structure(
    "Arguments", "x weight scales bias y starts columns values", "b in_ out group threads x_stride y_stride"
)
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "lossless32": 4, "lossless16": 5}
_DATA = {
    "float32": (torch.float32,), "bfloat16": (torch.bfloat16,), "int8": (torch.int8,), "int4": (torch.int16,),
    "lossless32": (torch.uint8,), "lossless16": (torch.uint8,),
}  # fmt: skip


def arguments(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> ctypes.Structure:
    """One product: x (b, in) and y (b, out) float32 with adjacent columns, bias (out,) float32."""
    rows = x.shape[0]
    return _arguments(
        weight, address_of_rows(x, FLOAT32, (rows, weight.in_features)), address(bias, FLOAT32, weight.out_features),
        address_of_rows(y, FLOAT32, (rows, weight.out_features)), rows, x.stride(0), y.stride(0),
    )  # fmt: skip


def _arguments(
    weight: PackedWeight, x: int | None, bias: int | None, y: int | None, rows: int, x_stride: int, y_stride: int
) -> ctypes.Structure:  # fmt: skip
    out = weight.out_features
    columns, groups = weight.row_sizes()
    starts, listed, values = weight.exceptions or (None, None, None)
    count = 0 if listed is None else listed.shape[0]
    return Arguments(
        x, address(weight.data, _DATA[weight.format], out * columns), address(weight.scales, FLOAT32, out * groups),
        bias, y, address(starts, INT32, out + 1), address(listed, INT32, count), address(values, FLOAT32, count),
        rows, weight.in_features, out, weight.group, native.threads(), x_stride, y_stride,
    )  # fmt: skip


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for a few rows of x (..., in)."""
    flat = x.reshape(-1, weight.in_features).float().contiguous()
    y = empty(flat.shape[0], weight.out_features, dtype=torch.float32)
    bias = as_float32(bias)
    call = arguments(flat, weight, bias, y)
    check(native.kernel("linear")(ctypes.byref(call), ctypes.c_int64(KINDS[weight.format])))
    return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() != 2 else y.to(x.dtype)


def widen(weight: PackedWeight) -> Tensor:
    """The weight (out, in) in float32."""
    if weight.format in ("float32", "bfloat16"):
        return weight.data.float()
    y = empty(weight.out_features, weight.in_features, dtype=torch.float32)
    call = _arguments(weight, None, None, address(y, FLOAT32, y.numel()), 0, 0, weight.in_features)  # x is not read
    check(native.kernel("widen")(ctypes.byref(call), ctypes.c_int64(KINDS[weight.format])))
    return y
