"""What a decode step reads of a model: each layer's tensors, where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.ops.linear.packed import PackedWeight

Weight = Tensor | PackedWeight


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer, read where they are at every step. Biases may be None.

    The large weights are of one kind: tensors of dt_proj's dtype, or int8, or int4.
    """

    norm: Tensor  # (h,)
    in_proj: Weight  # (2d, h)
    in_proj_bias: Tensor | None
    conv: Tensor  # (d, k)
    conv_bias: Tensor | None
    x_proj: Weight  # (r + 2n, d)
    dt_proj: Tensor  # (d, r)
    dt_bias: Tensor  # (d,)
    A_log: Tensor  # (d, n)
    D: Tensor  # (d,)
    out_proj: Weight  # (h, d)
    out_proj_bias: Tensor | None


def kind_of(weight: Weight) -> tuple[int, int] | None:
    """(bits, group) of a packed weight; None of a tensor."""
    if isinstance(weight, Tensor):
        return None
    if weight.format not in ("int8", "int4"):
        raise ValueError(f"a decode step on a GPU reads tensors, int8 or int4, not {weight.format} weights")
    return int(weight.format.removeprefix("int")), weight.group


def shape_of(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return weight.out_features, weight.in_features


def tensors_of(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """What a kernel reads, and its scales."""
    return (weight, None) if isinstance(weight, Tensor) else (weight.data, weight.scales)


@dataclass(frozen=True)
class ModelWeights:
    """What a step reads of a whole model. The layers' large weights and the head are of one kind."""

    layers: list[LayerWeights]
    embeddings: Tensor  # (v, h)
    final_norm: Tensor  # (h,)
    head: Weight  # (v, h)
    eps: float  # of every norm

    @property
    def kind(self) -> tuple[int, int] | None:
        """(bits, group) of the large weights, None of tensors; ValueError where they differ."""
        kinds = {kind_of(w) for layer in self.layers for w in (layer.in_proj, layer.x_proj, layer.out_proj)}
        kinds |= {kind_of(self.head)}
        if len(kinds) != 1:
            raise ValueError(f"the large weights are of different kinds {sorted(map(str, kinds))}; pack all or none")
        (kind,) = kinds
        return kind


def check_states(conv_states: Tensor, ssm_states: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """ValueError unless a step can update them in place, which reads SSM states of ``dtypes``."""
    if not (conv_states.is_contiguous() and ssm_states.is_contiguous()) or ssm_states.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"a decode step's states must be contiguous, and ssm_states {names}, to be updated in place")
