"""Models that accelerate has spread over devices, or whose weights lie elsewhere between uses (`device_map`, `cpu_offload`,
`disk_offload`).

Its hooks replace a module's forward: they bring the weights, move the inputs to the device where the module computes, and take the
weights away again. What they move they copy. A state must not be copied, or what a layer writes into it is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.state_cache import StateCache

# Arguments and results of a model that its hooks leave where they are.
KEPT_IN_PLACE = ("cache_params", "past_key_values", "cache")


class CacheHandle:
    """A cache as hooks see it, which copy whatever has a method `to` to another device: this has none."""

    __slots__ = ("cache",)

    def __init__(self, cache: StateCache):
        self.cache = cache


def opened(given: StateCache | CacheHandle | None, layer_idx: int, device: torch.device) -> StateCache | None:
    """The cache that a mixer was given; where hooks lie between, with its layer's tensors on ``device``, where it computes."""
    if not isinstance(given, CacheHandle):
        return given
    given.cache.place(layer_idx, device)
    return given.cache


def is_dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate is on this very module."""
    return "_hf_hook" in module.__dict__


def _hooks_on(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def keep_in_place(hook: Any) -> None:
    """Have a hook of accelerate leave states where they are. `device_map` says so itself, `dispatch_model` and the offloads do
    not."""
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "skip_keys"):
            given = [each.skip_keys] if isinstance(each.skip_keys, str) else list(each.skip_keys or ())
            each.skip_keys = list(dict.fromkeys([*given, *KEPT_IN_PLACE]))


def computing_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its parameters are, or where hooks bring them."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    for each in module.modules():
        for hook in _hooks_on(each):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.empty(0, dtype=torch.float32, device=device).device
    return torch.device("cpu") if parameter is None else parameter.device


def stored_value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of ``model``'s parameter or buffer ``name``: ``tensor`` itself, or what hooks keep of it elsewhere.

    Raises:
        ValueError: it is on meta and no hook has its values.
    """
    if not tensor.is_meta:
        return tensor
    *path, leaf = name.split(".")
    for depth in range(
        len(path), -1, -1
    ):  # the module's own hook, or one of a module around it that brings all at once
        for hook in _hooks_on(model.get_submodule(".".join(path[:depth]))):
            key, values = ".".join([*path[depth:], leaf]), getattr(hook, "weights_map", None)
            if values is not None and key in values:
                return values[key]
    raise ValueError(f"{name} is on meta, and no hook of accelerate has its values; load the model first")
