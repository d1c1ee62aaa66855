"""The public linear op with a packed weight: contract, checks, and the one entry to `mambakit::linear`.

On a CPU the kernels round x to 16 bits where the weight is int8 or int4, with one scale for every group: integers are
multiplied and summed exactly, groups are summed in float32. The error is at most 2^-16 of a group's largest number in
each number of x, typically 2e-5 of a product: a hundredth of what int8 weights bring.

On a GPU a half-precision x meets int8 and int4 weights that are rounded to its dtype. fp8 weights meet few rows of x as
they are; more rows of a half dtype are rounded to float8 (e4m3), each with a scale of its own, for the tensor cores'
8-bit products (`triton_plan.py` has the number): a relative error of 2^-4 at most, 2.5e-2 typically, in each number of
x. A GPU without 8-bit floats (compute capability below 8.9) raises for fp8 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._backends.memory import in_forward_mode, in_functorch
from mambakit.ops.linear import chunked, schema
from mambakit.ops.linear.cpu import MOST_ROWS as MOST_ROWS  # above it the CPU's product is torch's
from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.rms_norm.api import rms_norm


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x (..., in), in x's dtype; sums are float32 (float64 for float64).

    On a CPU, up to `MOST_ROWS` rows run on the native kernels at the speed of reading the weight, but for fp8; more
    rows and float64 widen the weight and use torch's product. On a GPU Triton's kernels read the packed weight once for
    few rows, and widen it at the memory's bandwidth for many. Differentiable in x and bias, any number of times,
    and not in the weight.

    Args:
        x: (..., in), any floating dtype.
        weight: (out, in), packed.
        bias: (out,), any floating dtype.

    Returns:
        (..., out) in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, or fp8 weights on a GPU without 8-bit floats.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, but the weight takes {weight.in_features} features")
    if in_functorch() or in_forward_mode():  # a custom op has no rules for them; plain PyTorch has
        return chunked.linear(x, weight, bias)
    return torch.ops.mambakit.linear(x, *schema.parts_of(weight), bias, weight.format, weight.in_features, weight.group)


def normed_linear(
    x: Tensor, norm: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, eps: float = 1e-5,
    residual: Tensor | None = None, residual_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rms_norm` and `linear` as one op: a norm that is followed by an fp8 product writes float8 and its rows' scales.

    Args:
        x, norm, eps, residual, residual_dtype: as `mambakit.ops.rms_norm` takes them; norm (in,).
        weight: (out, in), packed.
        bias: (out,), any floating dtype.
        dtype: of the norm and of the result; x's when None.

    Returns:
        (..., out) in ``dtype``, and the residual stream (..., in) in ``residual_dtype``.

    Raises:
        ValueError: as `linear` and `rms_norm`.
    """
    dtype = x.dtype if dtype is None else dtype
    tensors = (x, norm, residual, bias)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    shapes_fit = norm.shape == (weight.in_features,) == x.shape[-1:] and (residual is None or residual.shape == x.shape)
    if gradient or in_functorch() or in_forward_mode() or not shapes_fit:  # `rms_norm` says what does not fit
        y, kept = rms_norm(x, norm, eps, residual=residual, residual_dtype=residual_dtype, out_dtype=dtype)
        return linear(y, weight, bias), kept
    found: tuple[Tensor, Tensor] = torch.ops.mambakit.normed_linear(
        x, norm, residual, eps, residual_dtype, dtype, *schema.parts_of(weight), bias, weight.format,
        weight.in_features, weight.group,
    )  # fmt: skip
    return found
