"""The public RMSNorm: contract, checks, and the one entry to `mambakit::rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops.rms_norm import (
    chunked,
    schema,  # noqa: F401, defines the op
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum (arXiv 1910.07467).

    Args:
        x: (..., h), any floating dtype.
        weight: (h,), or None for a norm without parameters.
        residual: (..., h), added to ``x`` before the norm.
        residual_dtype: dtype the sum is kept in; that of ``residual``, else of ``x``.
        out_dtype: dtype of y; that of ``x`` when absent.

    Returns:
        y (..., h) = weight * sum / sqrt(mean(sum^2) + eps), and the sum, the new residual stream.

    Differentiable in ``x``, ``weight`` and ``residual``. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: a dtype that is not floating.
    """
    op = "rms_norm"
    _checks.require(x.dim() >= 1, f"{op}: x has no dimensions, expected (..., h)")
    _checks.dtype(op, "x", x, _checks.FLOATING)
    if weight is not None:
        _checks.shape(op, "weight", weight, (x.shape[-1],), "(h,)")
        _checks.dtype(op, "weight", weight, _checks.FLOATING)
    if residual is not None:
        _checks.shape(op, "residual", residual, tuple(x.shape), "the shape of x")
        _checks.dtype(op, "residual", residual, _checks.FLOATING)
    _checks.same_device(op, x.device, weight=weight, residual=residual)
    _checks.no_forward_mode(op, x, weight, residual)
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if in_functorch():
        return chunked.forward(x, weight, residual, eps, residual_dtype, out_dtype or x.dtype)
    return torch.ops.mambakit.rms_norm(x, weight, residual, eps, residual_dtype, out_dtype or x.dtype)
