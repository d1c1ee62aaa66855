"""Which Mamba layers run as one function on a GPU (`mambakit.ops.fused_mixer.layer`), asked in microseconds.

Such a run reads the parameters of the norm and of the mixer's layers, and calls none of these modules. So it takes what
`interception.py` tests: where there is a hook, an adapter or a patched class, the modules are called. So are quantised
layers where there are gradients.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mambakit.modules.interception import Watch, untouched
from mambakit.modules.left_padding import LeftPadding
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.modules.state_cache import StateCache
from mambakit.ops._releases import is_exporting
from mambakit.ops.fused_mixer.layer import KnownWeights, fused_layer
from mambakit.ops.fused_mixer.signature import PACKABLE, LayerWeights, PackedKind, PackedParts

# Where the parameters of `LayerWeights` are, behind the norm's: a child of the mixer, or the mixer itself, and a name.
_PARAMETERS = (
    ("in_proj", "weight"), ("in_proj", "bias"), ("conv1d", "weight"), ("conv1d", "bias"), ("x_proj", "weight"),
    ("dt_proj", "weight"), ("dt_proj", "bias"), ("", "A_log"), ("", "D"), ("out_proj", "weight"), ("out_proj", "bias"),
)  # fmt: skip
_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")  # children with a weight, where the mixer has them


class Fusable(Protocol):
    """A mixer with the layers and parameters of a Mamba layer under their usual names."""

    _modules: dict[str, Any]
    mixer_rms_eps: float | None
    """Of the norms of dt, B and C; None: there are none."""

    def fusion_setting(self) -> tuple:
        """What decides, beside the modules and what is on them, whether the mixer may run as one function."""

    def can_fuse_whole(self, packed: bool = False) -> bool:
        """Whether it may: every layer is of its usual class, and nothing is on it; ``packed``: or is quantised."""


class FusedLayer:
    """A mixer, and the norm that a block calls before it or None, as they were when this was made.

    For a mixer alone it holds the children only, so that it can be kept with the mixer as its key.
    """

    def __init__(self, norm: Any, mixer: Fusable):
        children = mixer._modules
        self._children, self._norm = list(children.values()), norm
        there = [child for child in self._children if child is not None]
        watched: list[Any] = there if norm is None else [norm, mixer, *there]
        self._watch = Watch(watched)
        self._setting = mixer.fusion_setting()
        self.known = KnownWeights()
        places: list[Any] = [(mixer if not child else children[child], name) for child, name in _PARAMETERS]
        linear: list[Any] = [children.get(name) for name in PACKABLE]
        self._packed = [module._buffers if type(module) is QuantizedLinear else None for module in linear]
        self._kinds = tuple(
            PackedKind(m.format, m.in_features, m.group) if type(m) is QuantizedLinear else None for m in linear
        )
        self._is_packed = any(self._kinds)
        places += [(children[child], "weight") for child in _NORMS if children.get(child) is not None]
        if norm is not None:
            places.insert(0, (norm, "weight"))
        # A dictionary each: a module finds its parameters and buffers the slow way.
        self._parameters = [
            (module._buffers, "data") if name == "weight" and type(module) is QuantizedLinear
            else (module._parameters, name)
            for module, name in places
        ]  # fmt: skip

    def holds(self, norm: Any, mixer: Fusable) -> bool:
        """Whether the modules are the same, and a call of them runs their classes' forwards and nothing else."""
        return (
            norm is self._norm and mixer.fusion_setting() == self._setting
            and list(mixer._modules.values()) == self._children and self._watch.holds()
        )  # fmt: skip

    def weights(self) -> LayerWeights | None:
        """None where a parameter is no parameter any more, as in sharded training that flattens them."""
        try:
            found: list[Any] = [tensors[name] for tensors, name in self._parameters]
        except KeyError:
            return None
        return LayerWeights(*found) if self._norm is not None else LayerWeights(None, *found)

    def packed(self) -> PackedParts | None:
        """What else there is of packed weights; None where every weight is plain."""
        if not self._is_packed:
            return None
        return PackedParts(self._kinds, tuple(b if b is None else b.get("scales") for b in self._packed))


_layers: WeakKeyDictionary[nn.Module, FusedLayer | None] = WeakKeyDictionary()


def on_gpu(x: Tensor) -> bool:
    """Whether x is where layers run as one function."""
    return x.is_cuda


def run(
    owner: nn.Module, norm: Any, mixer: Any, x: Tensor, residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None, cache: StateCache | None = None, padding: LeftPadding | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """The layer's output and the residual stream, or None where the layer's modules are to be called.

    Args:
        owner: the module that calls: a block, or the mixer itself without ``norm``.
        norm: an RMS norm with ``weight`` and ``eps``.
        x, residual: as the norm takes them, on a GPU, and residual_dtype.
        cache: read and updated in place; there is no plan for that with gradients.
        padding: on the left of each row; then there is a cache.
    """
    if torch.is_grad_enabled() and (cache is not None or _is_packed(mixer)):
        return None
    if torch.compiler.is_compiling():
        return _run_traced(norm, mixer, x, residual, residual_dtype) if cache is None and padding is None else None
    layer = _layers.get(owner)
    if layer is None or not layer.holds(norm, mixer):
        if not _can_fuse(norm, mixer, packed=True):
            return None
        layer = _layers[owner] = FusedLayer(norm, mixer)
    weights = layer.weights()
    if weights is None:
        return None
    states: Any = None if cache is None else cache.memory(mixer.layer_idx)
    eps = 0.0 if norm is None else norm.eps
    wide = states
    if states is not None and states[1].dtype == torch.bfloat16:
        wide = states[0], states[1].float()
    found = fused_layer(
        x, residual, weights, eps, residual_dtype, wide, known=layer.known, mixer_eps=mixer.mixer_rms_eps,
        packed=layer.packed(), pads=None if padding is None else padding.pads,
    )  # fmt: skip
    if found is not None and wide is not states:
        states[1].copy_(wide[1])
    return found


def _run_traced(
    norm: Any, mixer: Any, x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None] | None:
    """As one op of the graph. The graph's guards see to it that the modules stay what they are."""
    if is_exporting() or not _can_fuse(norm, mixer):
        return None
    from mambakit.ops.fused_mixer import traced

    m = mixer
    weights = LayerWeights(
        None if norm is None else norm.weight, m.in_proj.weight, m.in_proj.bias, m.conv1d.weight, m.conv1d.bias,
        m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, m.out_proj.weight, m.out_proj.bias,
        *(m._modules[name].weight for name in _NORMS if m._modules.get(name) is not None),
    )  # fmt: skip
    return traced.fused_layer(x, residual, weights, 0.0 if norm is None else norm.eps, residual_dtype, m.mixer_rms_eps)


def _is_packed(mixer: Any) -> bool:
    return any(type(mixer._modules.get(name)) is QuantizedLinear for name in PACKABLE)


def _can_fuse(norm: Any, mixer: Any, packed: bool = False) -> bool:
    """Whether nothing is on the modules; ``packed``: layers may be quantised."""
    if norm is not None and not (untouched(norm, type(norm)) and untouched(mixer, type(mixer))):
        return False
    return mixer.can_fuse_whole(packed)
