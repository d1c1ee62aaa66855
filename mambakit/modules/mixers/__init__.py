"""Sequence mixers, one file each, and what a configuration's choice of them makes of a model's state.

To add one: a subclass of `Mixer` in a file here, with its state tensors, an entry in `MIXERS`, and a configuration
whose ``mixer_class(layer_idx)`` names it. Forward, prefill, decode, caches, files and training then work on its state;
decode kernels that read weights say by themselves that they do not serve it.
``tests/modules/toy_mixer.py`` is an example.
"""

from __future__ import annotations

from typing import Any

import torch

from mambakit.modules.mixers.mamba import MambaMixer
from mambakit.modules.mixers.mixer import Mixer
from mambakit.modules.state_spec import StateSpec

__all__ = ["MIXERS", "MambaMixer", "Mixer", "computation_fields", "mixer_class", "state_spec"]

# By the name that a configuration uses.
MIXERS: dict[str, type[Mixer]] = {"mamba": MambaMixer}

# Of every architecture: what must agree between the model that wrote a state and the one that reads it.
_STATE_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# Of every architecture: what changes a model's results and no shape of a weight shows.
_COMPUTATION_FIELDS = ("model_type", "layer_norm_epsilon", "residual_in_fp32")


def mixer_class(config: Any, layer_idx: int) -> type[Mixer]:
    """Layer ``layer_idx``'s mixer: what ``config.mixer_class(layer_idx)`` says, and Mamba's for a configuration that is
    not mambakit's own (transformers' `MambaConfig`)."""
    choose = getattr(config, "mixer_class", None)
    return MIXERS["mamba"] if choose is None else choose(layer_idx)


def state_spec(config: Any, dtype: torch.dtype | str | None = None) -> StateSpec:
    """The state of a model of this configuration.

    Args:
        dtype: the model's; the configuration's when None, else float32.
    """
    given: Any = dtype or getattr(config, "dtype", None) or torch.float32
    # A configuration has it as text after its model was saved.
    kind: torch.dtype = getattr(torch, given.removeprefix("torch.")) if isinstance(given, str) else given
    mixers = _mixers(config)
    tensors = {mixer: mixer.state_tensors(config, kind) for mixer in dict.fromkeys(mixers)}
    layers = tuple(tensors[mixer] for mixer in mixers)
    own = [field for mixer in tensors for field in mixer.STATE_FIELDS]
    return StateSpec(layers, kind, {field: getattr(config, field, None) for field in (*_STATE_FIELDS, *own)})


def padded_window(config: Any) -> int | None:
    """`Mixer.padded_window` of a model whose layers agree on it; None where one of them takes no `LeftPadding`."""
    windows = {mixer.padded_window(config) for mixer in _mixers(config)}
    return windows.pop() if len(windows) == 1 else None


def computation_fields(config: Any) -> dict[str, Any]:
    """What changes a model's results besides its weights and their shapes."""
    own = [field for mixer in dict.fromkeys(_mixers(config)) for field in mixer.COMPUTATION_FIELDS]
    return {field: getattr(config, field, None) for field in (*_COMPUTATION_FIELDS, *own)}


def _mixers(config: Any) -> list[type[Mixer]]:
    return [mixer_class(config, index) for index in range(config.num_hidden_layers)]
