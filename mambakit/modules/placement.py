"""Models that accelerate has placed: on several devices (`device_map`), or with offloaded weights (`cpu_offload`,
`disk_offload`).

accelerate's hooks replace a module's forward. They load the weights, move the inputs to the module's device, and unload
the weights again. Moving makes copies. A state must not be copied: a layer's update of the copy would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.state_cache import StateCache

# Arguments and results of a model that hooks must not move.
KEPT_IN_PLACE = ("cache_params", "past_key_values", "cache")


class CacheHandle:
    """A cache passed through hooks, which copy anything with a method `to` to another device: this has none."""

    __slots__ = ("cache",)

    def __init__(self, cache: StateCache):
        self.cache = cache


def opened(given: StateCache | CacheHandle | None, layer_idx: int, device: torch.device) -> StateCache | None:
    """The cache that a mixer was given. Under hooks, its layer's tensors are moved to ``device``, where it computes."""
    if not isinstance(given, CacheHandle):
        return given
    given.cache.place(layer_idx, device)
    return given.cache


def is_dispatched(module: nn.Module) -> bool:
    """Whether this module has a hook of accelerate."""
    return "_hf_hook" in module.__dict__


def _hooks_on(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def keep_in_place(hook: Any) -> None:
    """Tell a hook of accelerate not to move states.

    `device_map` does so by itself; `dispatch_model` and the offloads do not.
    """
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "skip_keys"):
            given = [each.skip_keys] if isinstance(each.skip_keys, str) else list(each.skip_keys or ())
            each.skip_keys = list(dict.fromkeys([*given, *KEPT_IN_PLACE]))


def computing_device(module: nn.Module) -> torch.device:
    """The device that ``module`` computes on: that of its parameters, or that to which hooks move them."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    for each in module.modules():
        for hook in _hooks_on(each):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.empty(0, dtype=torch.float32, device=device).device
    return torch.device("cpu") if parameter is None else parameter.device


def stored_value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of ``model``'s parameter or buffer ``name``: ``tensor`` itself, or the offloaded values of a hook.

    Raises:
        ValueError: it is on meta and no hook has its values.
    """
    if not tensor.is_meta:
        return tensor
    *path, leaf = name.split(".")
    # The module's own hook has the values, or one of a module around it that loads all weights at once.
    for depth in range(len(path), -1, -1):
        for hook in _hooks_on(model.get_submodule(".".join(path[:depth]))):
            key, values = ".".join([*path[depth:], leaf]), getattr(hook, "weights_map", None)
            if values is not None and key in values:
                return values[key]
    raise ValueError(f"{name} is on meta, and no hook of accelerate has its values; load the model first")
