"""What code puts in the place of upstream's names: ``mamba_simple.selective_scan_fn = recorded``.

Upstream's layers and models look up such names in their own module at every call. So code replaces them there: to
record a scan's operands, to change the scan, to build a language model of another mixer. What is set on a module that
mambakit gives is noted here, and the layers and models ask.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from mambakit.compat.surface import MODULES

# Name -> what replaces it; None where code takes a function away, which upstream answers by plain PyTorch.
LAYER: dict[str, Any] = {}
MODEL: dict[str, Any] = {}
GENERATION: dict[str, Any] = {}

# Module -> the names that are asked for, and where a replacement is noted.
_ASKED: dict[str, tuple[frozenset[str], dict[str, Any]]] = {
    "mamba_ssm.modules.mamba_simple": (
        frozenset({
            "selective_scan_fn", "mamba_inner_fn", "causal_conv1d_fn", "causal_conv1d_update", "selective_state_update",
        }),
        LAYER,
    ),
    "mamba_ssm.models.mixer_seq_simple": (
        frozenset({
            "Mamba", "Block", "MixerModel", "create_block", "_init_weights", "load_config_hf", "load_state_dict_hf",
        }),
        MODEL,
    ),
    "mamba_ssm.utils.generation": (frozenset({"decode", "sample"}), GENERATION),
}  # fmt: skip


class GivenModule(ModuleType):
    """A module of the table: what is set on it by a name that mambakit asks for is noted."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        names, noted = _ASKED.get(self.__name__, (frozenset(), {}))
        if name not in names:
            return
        place, _, ours = MODULES[self.__name__][name].partition(":")
        if value is getattr(importlib.import_module(place), ours):  # put back
            noted.pop(name, None)
        else:
            noted[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _ASKED.get(self.__name__, (frozenset(), {}))[1].pop(name, None)


def forget(module: ModuleType) -> None:
    """A module that is made, or loaded again, has what mambakit gives."""
    names, noted = _ASKED.get(module.__name__, (frozenset(), {}))
    noted.clear()
    for name in names:
        module.__dict__.pop(name, None)
