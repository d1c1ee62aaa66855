"""CUDA graphs of models: whether one serves, and the objects that are kept with a model between calls.

A graph replays kernels on the memory addresses of its capture. It is valid as long as the model's tensors stay at those
addresses and its modes (training, adapters) stay the same. `Placement` records both. Its check runs before every
prompt, and takes about 0.1 ms.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.interception import Watch, any_intercepted, modules_of
from mambakit.ops._backends.captured_graph import CapturedGraph as CapturedGraph
from mambakit.ops._backends.memory import all_plain, observed, transformed

# -- whether a model's forward can be captured -------------------------------------------------------------------------


def why_not_captured(model: Any, called: bool = False) -> str | None:
    """Why a forward of this model cannot be captured, or None where it can.

    It needs plain tensors on one CUDA device, no hooks that the graph would skip, and no autocast, other capture, trace
    or transform.

    Args:
        called: whether this is asked inside the model's own forward, whose hooks have run already.
    """
    device = model.device
    if device.type != "cuda":
        return f"the model is on {device}; a CUDA graph needs it on a GPU"
    if model.dtype == torch.float64:
        return "float64 weights"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "the stream is being captured"
    if transformed() or observed():
        return "the call is traced, transformed or observed"
    if not called and any_intercepted([model]):
        return "the model has a hook or a forward of its own"
    watch = _watches.get(model)
    if watch is None or not watch.holds():
        modules = modules_of(model)[1:]
        if any_intercepted(modules):
            return "a module has a hook, or a forward that a graph would skip"
        _watches[model] = Watch(modules)
    return None if placement_of(model).lies_on(device) else f"not all tensors are plain ones on {device}"


def graphs_serve(model: Any, called: bool = False) -> bool:
    """Whether `why_not_captured` has no reason."""
    return why_not_captured(model, called) is None


# Per model: its submodules, found to have no hooks. Checking a `Watch` takes a tenth of the time of a new search.
# The model itself is not watched: the entry would keep it alive.
_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()


# -- what is kept with a model -----------------------------------------------------------------------------------------


class Placement:
    """Where a model's tensors lie, and the modes that a captured forward depends on: training, adapters on or off.

    It keeps the model's submodules and tensors alive, but not the model.
    """

    def __init__(self, model: nn.Module):
        modules = modules_of(model)
        self._children = [m._modules for m in modules]
        self._modules = list(chain.from_iterable(map(dict.values, self._children)))
        self._tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))
        self._tensors: list[Tensor] = [t for t in self._entries if t is not None]
        self._plain = all_plain(self._tensors)
        self._addresses, self._devices = self._now(), {t.device for t in self._tensors}
        self._switched = [m for m in modules[1:] if isinstance(getattr(type(m), "disable_adapters", None), property)]
        self._switches, self._training = list(map(_switches, self._switched)), model.training

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors)) if self._plain else []

    def holds(self, model: nn.Module) -> bool:
        """Whether nothing has changed. Always False with special tensors, whose data pointer means nothing."""
        return (
            self._plain
            and model.training == self._training
            and _same(chain.from_iterable(map(dict.values, self._children)), self._modules)
            and _same(chain.from_iterable(map(dict.values, self._tables)), self._entries)
            and self._now() == self._addresses
            and list(map(_switches, self._switched)) == self._switches
        )

    def versions(self) -> list[int]:
        """Torch's count of in-place writes of each tensor; 0 for inference tensors, which have none."""
        return [0 if t.is_inference() else t._version for t in self._tensors]

    def lies_on(self, device: torch.device) -> bool:
        """Whether every tensor is plain memory on this device."""
        return self._plain and self._devices <= {device}


def _same(now: Any, before: list[Any]) -> bool:
    found = list(now)
    return len(found) == len(before) and all(map(is_, found, before))


def _switches(module: Any) -> tuple[Any, ...]:
    return module.disable_adapters, tuple(module.active_adapters), tuple(getattr(module, "merged_adapters", ()))


class _Kept:
    def __init__(self, placement: Placement):
        self.placement = placement
        self.things: OrderedDict[tuple, Any] = OrderedDict()  # least recently used first


# Per model. Entries are freed with the model, so none of them may hold a reference to it.
_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
_MOST_KEPT = 5  # each holds states for its rows


def placement_of(model: Any) -> Placement:
    """The model's placement: the same object as long as it holds."""
    return _kept_of(model).placement


def _kept_of(model: Any) -> _Kept:
    kept = _kept.get(model)
    if kept is None or not kept.placement.holds(model):
        kept = _kept[model] = _Kept(Placement(model))
    return kept


def kept_with(model: Any, key: tuple, make: Callable[[], Any]) -> Any:
    """An object that is kept with a model, such as a captured decoder.

    It is made by ``make`` at the first use of ``key``, and again after the model's `Placement` has changed. It must not
    hold a reference to the model. The least recently used object goes when there are too many.
    """
    things = _kept_of(model).things
    if key not in things:
        while len(things) >= _MOST_KEPT:
            things.popitem(last=False)
        # Inference tensors could not be written outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            things[key] = make()
    things.move_to_end(key)
    return things[key]
