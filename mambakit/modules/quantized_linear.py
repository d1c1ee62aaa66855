"""A linear layer whose weight is stored in 8 or 4 bits; activations and sums are float32 or the model's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambakit.modules.precision import keep_float32
from mambakit.ops.linear import linear, pack
from mambakit.ops.linear.api import GROUP, PackedWeight, blank


class QuantizedLinear(nn.Module):
    """(..., in) -> (..., out) with an int8 or int4 weight and one float32 scale for every ``group`` numbers of a row.

    For inference: the weight has no gradient (the input has). The format is that of `mambakit.ops.linear`.
    """

    data: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, format: str, group: int = GROUP, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.format, self.group = in_features, out_features, format, group
        packed = blank(format, out_features, in_features, group)
        self.register_buffer("data", packed.data)
        self.register_buffer("scales", packed.scales)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, source: nn.Linear, format: str, group: int = GROUP) -> QuantizedLinear:
        layer = cls(source.in_features, source.out_features, format, group, bias=False)
        packed = pack(source.weight, format, group)
        assert packed.scales is not None
        layer.data, layer.scales = packed.data, packed.scales
        layer.bias = source.bias
        return layer

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.format, self.data, self.scales, self.in_features, self.group)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.packed, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True):
        return super()._apply(lambda t: keep_float32(fn, t) if t is self.scales else fn(t), recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}, group={self.group}"
