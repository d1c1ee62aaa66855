"""The public linear op with a packed weight: contract, checks, and the one entry to `mambakit::linear`.

On a CPU the kernels round x to 16 bits where the weight is int8 or int4, with one scale for every group: integers are
multiplied and summed exactly, groups are summed in float32. The error is at most 2^-16 of a group's largest number in
each number of x, typically 2e-5 of a product: a hundredth of what int8 weights bring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._backends.memory import in_forward_mode, in_functorch
from mambakit.ops.linear import chunked, schema
from mambakit.ops.linear.cpu import MOST_ROWS as MOST_ROWS  # above it the CPU's product is torch's
from mambakit.ops.linear.packed import PackedWeight


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x (..., in), in x's dtype; sums are float32 (float64 for float64).

    On a CPU, up to `MOST_ROWS` rows run on the native kernels at the speed of reading the weight; more rows, other
    devices and float64 widen the weight and use torch's product. Differentiable in x and bias, any number of times, and
    not in the weight.

    Args:
        x: (..., in), any floating dtype.
        weight: (out, in), packed.
        bias: (out,), any floating dtype.

    Returns:
        (..., out) in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, but the weight takes {weight.in_features} features")
    if in_functorch() or in_forward_mode():  # a custom op has no rules for them; plain PyTorch has
        return chunked.linear(x, weight, bias)
    return torch.ops.mambakit.linear(x, *schema.parts_of(weight), bias, weight.format, weight.in_features, weight.group)
