"""Mamba's state as a cache: two tensors, whatever the number of tokens seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mambakit.modules.mixers import state_spec
from mambakit.modules.state_cache import StateCache
from mambakit.modules.state_spec import StateSpec


class MambaCache(StateCache):
    """The convolution windows and SSM states of every layer, for ``max_batch_size`` slots.

    Its two tensors have attributes of their own; all else is `StateCache`'s.

    Args:
        config: the model's configuration; every layer of it has a state of ``conv`` and ``ssm``.
        max_batch_size: number of slots.
        device: where the tensors live; torch's default device when absent. A list of devices, one for each layer, for a
            model that lies on several: ``conv_states`` and ``ssm_states`` are then a `LayeredTensor`.
        dtype: the model's; the configuration's, else float32.

    Raises:
        ValueError: layers with another state; `new_cache` makes the cache of any configuration.
    """

    def __init__(
        self,
        config: Any,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        spec = state_spec(config, dtype)
        if not _is_mamba(spec):
            raise ValueError(f"a MambaCache holds conv and ssm alike in every layer, not {spec!r}; use new_cache()")
        super().__init__(spec, max_batch_size, device)
        self.config = config

    @classmethod
    def for_model(
        cls,
        config: Any,
        max_batch_size: int,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> MambaCache:
        """A zero state for a model of configuration ``config`` and of ``dtype`` (the configuration's when None)."""
        return cls(config, max_batch_size, device, dtype)

    @property
    def conv_states(self) -> Any:
        """(layers, b, d, k - 1), the last k - 1 inputs of each convolution, in the model's dtype."""
        return self.tensors()["conv_states"]

    @property
    def ssm_states(self) -> Any:
        """(layers, b, d, n), float32 whatever the weights are (float64 in a float64 model), or the configuration's
        ``ssm_state_dtype``."""
        return self.tensors()["ssm_states"]


def new_cache(
    config: Any,
    max_batch_size: int,
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> StateCache:
    """A zero state for a model of any configuration: a `MambaCache` where every layer has ``conv`` and ``ssm`` alike.
    The arguments are its own."""
    spec = state_spec(config, dtype)
    return (
        MambaCache(config, max_batch_size, device, dtype)
        if _is_mamba(spec)
        else StateCache(spec, max_batch_size, device)
    )


def _is_mamba(spec: StateSpec) -> bool:
    whole = tuple(range(len(spec.layers)))
    return not whole or [(s.key, s.layers) for s in spec.stacks] == [("conv_states", whole), ("ssm_states", whole)]
