"""The linear op in plain PyTorch: widen the weight, then multiply. It serves where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops.linear.packed import PackedWeight


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, widened: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; float32 arithmetic (float64 for float64), rounded to x's dtype.

    ``widened`` is the weight (out, in) in float32 where the caller has it.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with no_autocast(x.device):
        y = x.to(dtype) @ (weight.dequantized() if widened is None else widened).to(dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
