"""The Python side of selection_norm's kernels: outputs, strides and pointers."""

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
    "x dt_weight B_weight C_weight y",
    "rows r n x_half y_half threads x_stride y_stride",
    doubles="eps",
)
_Gradients = structure(
    "_Gradients",
    "dy x dt_weight B_weight C_weight dx dweights parts_of_dweights",
    "rows r n parts dy_half x_half dx_half threads",
    doubles="eps",
)
# The weights' gradients are summed in at most this many runs of rows, whatever the number of threads.
_PARTS = 64


def serves(*args) -> bool:
    """float64 is the reference's."""
    return not any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args)


def _kernels(tensor: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels read."""
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).contiguous()


def in_place(x: Tensor, rank: int, eps: float, weights: tuple[Tensor | None, ...]) -> ctypes.Structure:
    """The arguments of the kernel on rows x (b, r + 2 n) float32 of a decode step, which it overwrites."""
    b, width = x.shape
    n = (width - rank) // 2
    at = address_of_rows(x, FLOAT32, (b, width))
    of_weights = (address(w, FLOAT32, size) for w, size in zip(weights, (rank, n, n), strict=True))
    return Arguments(at, *of_weights, at, b, rank, n, 0, 0, native.threads(), x.stride(0), x.stride(0), eps)


def forward(selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm`."""
    x = _kernels(selected)
    width, count = x.shape[-1], math.prod(x.shape[:-1])
    n = (width - rank) // 2
    weights = [as_float32(w) for w in (dt_weight, B_weight, C_weight)]
    y = empty(*x.shape, dtype=x.dtype)
    arguments = Arguments(
        address(x, FLOAT32_OR_BFLOAT16, count * width),
        *(address(w, FLOAT32, size) for w, size in zip(weights, (rank, n, n), strict=True)),
        address(y, FLOAT32_OR_BFLOAT16, count * width), count, rank, n, is_half(x), is_half(y), native.threads(),
        width, width, eps,
    )  # fmt: skip
    check(native.kernel("selection_norm")(ctypes.byref(arguments), ctypes.c_int64(0)))
    return y.to(selected.dtype)


def backward(dy, selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm_backward`."""
    dy, x = _kernels(dy), _kernels(selected)
    width, count = x.shape[-1], math.prod(x.shape[:-1])
    n = (width - rank) // 2
    given = dt_weight, B_weight, C_weight
    weights = [as_float32(w) for w in given]
    parts = max(1, min(_PARTS, count // 8))
    dx = empty(*x.shape, dtype=x.dtype)
    weighted = dt_weight is not None
    dweights = empty(width, dtype=torch.float32) if weighted else None
    partial = empty(parts, width, dtype=torch.float32) if weighted else None
    gradients = _Gradients(
        address(dy, FLOAT32_OR_BFLOAT16, count * width), address(x, FLOAT32_OR_BFLOAT16, count * width),
        *(address(w, FLOAT32, size) for w, size in zip(weights, (rank, n, n), strict=True)),
        address(dx, FLOAT32_OR_BFLOAT16, count * width), address(dweights, FLOAT32, width),
        address(partial, FLOAT32, parts * width), count, rank, n, parts, is_half(dy), is_half(x), is_half(dx),
        native.threads(), eps,
    )  # fmt: skip
    check(native.kernel("selection_norm_backward")(ctypes.byref(gradients)))
    dx = dx.to(selected.dtype)
    if dweights is None:
        return dx, *(empty(0, dtype=torch.float32) for _ in given)
    return dx, *(
        g.to(w.dtype) if g.dtype != w.dtype else g.clone()
        for g, w in zip(dweights.split([rank, n, n]), given, strict=True)
    )
