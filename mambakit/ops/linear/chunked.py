"""The linear op in plain PyTorch: widen the weight, then multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops.linear import lossless

if TYPE_CHECKING:
    from mambakit.ops.linear.api import PackedWeight


def dequantize(weight: PackedWeight) -> Tensor:
    """The weight (out, in) in float32."""
    if weight.exceptions is not None:
        return lossless.unpack(weight.data, weight.exceptions, weight.format, weight.in_features)
    if weight.scales is None:
        return weight.data.float()
    if weight.format == "int4":
        words = weight.data.to(torch.int32).unflatten(1, (-1, 1, 16))  # (out, blocks, 1, word)
        shifts = torch.arange(28, 12, -4, dtype=torch.int32, device=words.device)[:, None]
        q = ((words << shifts) >> 28).flatten(1)  # (out, blocks, s, word): the sign comes with the shift to the right
    else:
        q = weight.data
    scales = weight.scales.repeat_interleave(weight.group, 1)
    return q[:, : weight.in_features].float() * scales[:, : weight.in_features]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, widened: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; float32 arithmetic (float64 for float64), rounded to x's dtype.

    ``widened`` is the weight (out, in) in float32 where the caller has it.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with no_autocast(x.device):
        y = x.to(dtype) @ (dequantize(weight) if widened is None else widened).to(dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
