"""The Python side of rms_norm's kernels: outputs, strides and pointers."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops._backends.memory import empty
from mambakit.ops._backends.structures import (
    FLOAT32,
    FLOAT32_OR_BFLOAT16,
    address,
    address_of_rows,
    as_float32,
    check,
    is_half,
    structure,
)

Arguments = structure(
    "Arguments",
    "x weight residual y residual_out",
    "rows h x_half residual_half y_half out_half threads x_stride residual_stride",
    doubles="eps",
)
_Gradients = structure(
    "_Gradients",
    "dy dresidual_out residual_out weight dx dresidual dweight dweight_parts",
    "rows h parts dy_half dout_half out_half dx_half threads dy_stride dout_stride out_stride",
    doubles="eps",
)
# The weight's gradient is summed in at most this many runs of rows, whatever the number of threads.
_PARTS = 64


def serves(*args) -> bool:
    """float64, among the tensors or asked for, is the reference's."""
    return not any((a.dtype if isinstance(a, Tensor) else a) is torch.float64 for a in args)


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor as evenly spaced rows of adjacent numbers (copied only when it is not), and their distance."""
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    h = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor, h
    # A slice of a wider projection: rows lie apart, evenly.
    rows = [s for size, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
    sizes = [size for size in tensor.shape[:-1] if size != 1]
    even = all(rows[i] == rows[i + 1] * sizes[i + 1] for i in range(len(rows) - 1))
    if tensor.stride(-1) == 1 and even and rows:
        return tensor, rows[-1]
    return tensor.contiguous(), h


def _optional_rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if tensor is None else _rows(tensor)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def forward(x, weight, residual, eps, residual_dtype, out_dtype):
    """`mambakit::rms_norm`."""
    h = x.shape[-1]
    count = math.prod(x.shape[:-1])
    rows, stride = _rows(x)
    kept, kept_stride = _optional_rows(residual)
    weight = as_float32(weight)
    y = empty(*x.shape, dtype=_kernel_dtype(out_dtype))
    # Rounding to float16 before the norm, as the reference does, is exact only if what is kept is float16.
    if residual_dtype == torch.float16:
        total = rows.float() if kept is None else rows.float() + kept.float()
        rows, stride = _rows(total.half())
        kept, kept_stride = None, 0
    residual_out = empty(*x.shape, dtype=_kernel_dtype(residual_dtype))
    arguments = Arguments(
        address_of_rows(rows, FLOAT32_OR_BFLOAT16, x.shape), address(weight, FLOAT32, h),
        address_of_rows(kept, FLOAT32_OR_BFLOAT16, x.shape), address(y, FLOAT32_OR_BFLOAT16, count * h),
        address(residual_out, FLOAT32_OR_BFLOAT16, count * h), count, h, is_half(rows),
        kept is not None and is_half(kept), is_half(y), is_half(residual_out), native.threads(), stride, kept_stride,
        eps,
    )  # fmt: skip
    check(native.kernel("rms_norm")(ctypes.byref(arguments), ctypes.c_int64(0)))
    return y.to(out_dtype), residual_out.to(residual_dtype)


def backward(dy, dresidual_out, residual_out, weight, eps, x_dtype, has_residual):
    """`mambakit::rms_norm_backward`."""
    h = residual_out.shape[-1]
    count = math.prod(residual_out.shape[:-1])
    parts = max(1, min(_PARTS, count // 8))
    (dy, dy_stride), (total, stride) = _rows(dy), _rows(residual_out)
    dout, dout_stride = _optional_rows(dresidual_out)
    scale = as_float32(weight)
    shape = total.shape
    dx = empty(*shape, dtype=_kernel_dtype(x_dtype))
    dresidual = empty(*shape, dtype=total.dtype) if has_residual else None
    dweight = None if weight is None else empty(h, dtype=torch.float32)
    dweight_parts = None if weight is None else empty(parts, h, dtype=torch.float32)
    gradients = _Gradients(
        *(address_of_rows(t, FLOAT32_OR_BFLOAT16, shape) for t in (dy, dout, total)), address(scale, FLOAT32, h),
        address(dx, FLOAT32_OR_BFLOAT16, count * h), address(dresidual, (total.dtype,), count * h),
        address(dweight, FLOAT32, h), address(dweight_parts, FLOAT32, parts * h),
        count, h, parts, is_half(dy), dout is not None and is_half(dout),
        is_half(total), is_half(dx), native.threads(), dy_stride, dout_stride, stride, eps,
    )  # fmt: skip
    check(native.kernel("rms_norm_backward")(ctypes.byref(gradients)))
    return (
        dx.to(x_dtype),
        residual_out.new_empty(0) if dweight is None else dweight.to(weight.dtype),
        residual_out.new_empty(0) if dresidual is None else dresidual.to(residual_out.dtype),
    )
