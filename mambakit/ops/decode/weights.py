"""What a decode step reads of a model: each layer's tensors, where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.ops.linear.packed import PackedWeight

Weight = Tensor | PackedWeight
_BITS = {"int8": 8, "int4": 4, "fp8": 1}  # as kernels name the formats


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer, read where they are at every step. Biases may be None.

    The large weights are of one kind: tensors of dt_proj's dtype, or int8, int4 or fp8.
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
    # Weights of the norms of dt, B and C: (r,), (n,), (n,), all three or none.
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None

    def norms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dt_norm, self.B_norm, self.C_norm


def kind_of(weight: Weight) -> tuple[int, int] | None:
    """(bits, group) of a packed weight, bits 1 for fp8; None of a tensor."""
    if isinstance(weight, Tensor):
        return None
    if weight.format not in _BITS:
        raise ValueError(f"a decode step on a GPU reads tensors, {', '.join(_BITS)}, not {weight.format} weights")
    return _BITS[weight.format], weight.group


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
    eps: float  # of the norms of the residual stream
    mixer_eps: float | None = None  # of the norms of dt, B and C (`mambakit.ops.selection_norm`); None: there are none

    @property
    def norms(self) -> int:
        """Of dt, B and C: 0 none, 1 without weights, 2 with weights; ValueError where layers differ."""
        weighted = {layer.dt_norm is not None for layer in self.layers}
        if len(weighted) > 1:
            raise ValueError("the norms of dt, B and C have weights in some layers only; give them to all or none")
        if self.mixer_eps is None:
            return 0
        return 2 if True in weighted else 1

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
