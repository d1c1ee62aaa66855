"""Which Mamba layers run as one function on a GPU (`mambakit.ops.fused_mixer.layer`), asked in microseconds.

Such a run reads the parameters of the norm and of the mixer's layers, and calls none of these modules. So it takes what
`interception.py` tests: where there is a hook, an adapter, a quantised layer or a patched class, the modules are
called.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mambakit.modules.interception import Watch, untouched
from mambakit.modules.norm import RMSNorm
from mambakit.modules.state_cache import StateCache
from mambakit.ops.fused_mixer.layer import fused_layer
from mambakit.ops.fused_mixer.layer import on_gpu as on_gpu
from mambakit.ops.fused_mixer.signature import LayerWeights

# Where the parameters of `LayerWeights` are, behind the norm's: a child of the mixer, or the mixer itself, and a name.
_PARAMETERS = (
    ("in_proj", "weight"), ("in_proj", "bias"), ("conv1d", "weight"), ("conv1d", "bias"), ("x_proj", "weight"),
    ("dt_proj", "weight"), ("dt_proj", "bias"), ("", "A_log"), ("", "D"), ("out_proj", "weight"), ("out_proj", "bias"),
)  # fmt: skip


class FusedLayer:
    """A mixer, and the norm that a block calls before it or None, as they were when this was made.

    For a mixer alone it holds the children only, so that it can be kept with the mixer as its key.
    """

    def __init__(self, norm: Any, mixer: Any):
        children = mixer._modules
        self._children, self._norm = list(children.values()), norm
        self._watch = Watch(self._children if norm is None else [norm, mixer, *self._children])
        self._setting = _setting(mixer)
        places = [(mixer if not child else children[child], name) for child, name in _PARAMETERS]
        if norm is not None:
            places.insert(0, (norm, "weight"))
        # A dictionary each: a module finds its parameters the slow way.
        self._parameters = [(module._parameters, name) for module, name in places]

    def holds(self, norm: Any, mixer: Any) -> bool:
        """Whether the modules are the same, and a call of them runs their classes' forwards and nothing else."""
        return (
            norm is self._norm and _setting(mixer) == self._setting
            and list(mixer._modules.values()) == self._children and self._watch.holds()
        )  # fmt: skip

    def weights(self) -> LayerWeights | None:
        """None where a parameter is no parameter any more, as in sharded training that flattens them."""
        found = [parameters.get(name, _ABSENT) for parameters, name in self._parameters]
        if any(t is _ABSENT for t in found):
            return None
        return LayerWeights(*found) if self._norm is not None else LayerWeights(None, *found)


_ABSENT: Any = object()
_layers: WeakKeyDictionary[nn.Module, FusedLayer | None] = WeakKeyDictionary()


def _setting(mixer: Any) -> tuple:
    """What decides, beside its modules, whether a mixer can be fused."""
    return mixer.act, mixer.mixer_rms_eps, mixer.causal_conv1d, mixer.selective_scan, mixer.recompute_selection


def run(
    owner: nn.Module, norm: Any, mixer: Any, x: Tensor, residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None, cache: StateCache | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """The layer's output and the residual stream, or None where the layer's modules are to be called.

    Args:
        owner: the module that calls: a block, or the mixer itself without ``norm``.
        mixer: a `MambaMixer`.
        x, residual: as the norm takes them, on a GPU, and residual_dtype.
        cache: read and updated in place; there is no plan for that with gradients.
    """
    if cache is not None and torch.is_grad_enabled():
        return None
    layer = _layers.get(owner)
    if layer is None or not layer.holds(norm, mixer):
        if not _can_fuse(norm, mixer):
            return None
        layer = _layers[owner] = FusedLayer(norm, mixer)
    weights = layer.weights()
    if weights is None:
        return None
    states: Any = None if cache is None else cache.memory(mixer.layer_idx)
    return fused_layer(x, residual, weights, 0.0 if norm is None else norm.eps, residual_dtype, states)


def _can_fuse(norm: Any, mixer: Any) -> bool:
    """Whether the layer is made of the norm and the mixer of this package, and nothing is on them."""
    if mixer.recompute_selection:
        return False
    if norm is not None and not (untouched(norm, RMSNorm) and untouched(mixer, type(mixer))):
        return False
    return untouched(mixer.in_proj, nn.Linear) and untouched(mixer.out_proj, nn.Linear) and mixer.can_fuse()
