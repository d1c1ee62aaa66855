"""A linear layer whose weight is packed: in 8 or 4 bits, or in 28 or 12 without loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.interception import untouched
from mambakit.modules.norm import RMSNorm, compute_dtype
from mambakit.modules.precision import keep_float32
from mambakit.ops.linear import linear, normed_linear, pack
from mambakit.ops.linear.packed import GROUP, PackedWeight, blank


class QuantizedLinear(nn.Module):
    """(..., in) -> (..., out) with a weight in one of the packed formats of `mambakit.ops.linear`.

    For inference: the weight has no gradient (the input has). int8 and int4 have one float32 scale for every ``group``
    numbers of a row, fp8 has one for each row.
    """

    data: Tensor
    scales: Tensor  # int8, int4 and fp8
    bias: nn.Parameter | None
    starts: Tensor  # the lossless formats
    columns: Tensor
    values: Tensor

    def __init__(self, in_features: int, out_features: int, format: str, group: int = GROUP, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.format, self.group = in_features, out_features, format, group
        self._keep(blank(format, out_features, in_features, group))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @classmethod
    def from_linear(cls, source: nn.Linear, format: str, group: int = GROUP) -> QuantizedLinear:
        layer = cls(source.in_features, source.out_features, format, group, bias=False)
        layer._keep(pack(source.weight, format, group))
        layer.bias = source.bias
        return layer

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """The plain layer with the numbers that the packed weight stands for, rounded to ``dtype``."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.packed.dequantized().to(dtype))
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    def _keep(self, weight: PackedWeight) -> None:
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"the weight of this layer is packed ({self.format}): `packed.dequantized()` gives its numbers, and "
                "model.dequantize() plain layers"
            )
        return super().__getattr__(name)

    @property
    def packed(self) -> PackedWeight:
        exceptions = (self.starts, self.columns, self.values) if hasattr(self, "starts") else None
        return PackedWeight(
            self.format, self.data, getattr(self, "scales", None), self.in_features, self.group, exceptions
        )

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.packed, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True):
        def moved(t: Tensor) -> Tensor:
            """The packed numbers and their float32 scales move, and are never cast: the kernels read them by their
            layout."""
            out = keep_float32(fn, t)
            return out if out.dtype == t.dtype else t.to(out.device)

        return super()._apply(lambda t: fn(t) if t is self.bias else moved(t), recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        if prefix + "weight" in state_dict:
            raise ValueError(
                f"load_state_dict: {prefix}weight is plain and the layer's is packed ({self.format}); "
                "call model.dequantize() first"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.format in ("int8", "int4") else ""
        return f"{self.in_features}, {self.out_features}, {self.format}{group}"


def normed_projection(
    norm: Any, mixer: Any, x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """The mixer's in_proj of the norm, and the residual stream, as one op: the norm finds the scales of float8 rows.

    None where there is nothing to gain (weights in another format), or the modules are to be called: something is on
    them.
    """
    layer = mixer.in_proj
    if not (isinstance(layer, QuantizedLinear) and layer.format == "fp8"):
        return None
    if not (untouched(norm, RMSNorm) and untouched(layer, QuantizedLinear) and untouched(mixer, type(mixer))):
        return None
    dtype = compute_dtype(x.device, norm.weight.dtype)
    return normed_linear(
        x, norm.weight, layer.packed, layer.bias, eps=norm.eps, residual=residual, residual_dtype=residual_dtype,
        dtype=dtype,
    )  # fmt: skip
