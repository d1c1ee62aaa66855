"""Shared by the configurations of all families: reading, checks, and the default of ``initializer_range``."""

from __future__ import annotations

import os
from typing import Any

from mambakit.models.checkpoints.configuration import read_configuration
from mambakit.models.checkpoints.storage import HUB_ARGUMENTS, small_files
from mambakit.quoting import brief

# Output fields that Trainer must not gather: the state, under its name in any release of transformers.
IGNORED_AT_INFERENCE = ["cache_params", "past_key_values", "cache"]
# transformers passes these to `from_pretrained`; they are no fields.
_INTERNAL = ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "proxies")


class _UnsetRange(float):
    """The default of ``initializer_range``: transformers' value, and recognisable as not given."""


UNSET_RANGE = _UnsetRange(0.1)


def uses_mamba_ssm_recipe(initializer_range: float) -> bool:
    """Whether ``initializer_range`` was not given: a new model then starts as mamba_ssm's does."""
    return isinstance(initializer_range, _UnsetRange)


def without_unset_range(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` without a range that was not given: a reader of the file would take it for given. Nor is
    ``ssm_state_dtype``, mambakit's own, among them while it is off."""
    if fields.get("ssm_state_dtype", "") is None:
        del fields["ssm_state_dtype"]
    if "initializer_range" in fields and uses_mamba_ssm_recipe(fields["initializer_range"]):
        del fields["initializer_range"]
    return fields


def read(cls: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> Any:
    """``cls.from_pretrained``: the configuration of a checkpoint in any format, checked.

    Returns:
        The configuration; with ``return_unused_kwargs`` also the arguments that are not its fields.
    """
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    wants_unused = kwargs.pop("return_unused_kwargs", False)
    for internal in _INTERNAL:
        kwargs.pop(internal, None)
    config, unused = read_configuration(small_files(name, **hub), cls, **kwargs)
    config.name_or_path = str(name)
    return (config, unused) if wants_unused else config


def check(config: Any) -> None:
    """ValueError where a field of a Mamba configuration has a value that no model can have."""
    for field in ("vocab_size", "hidden_size", "state_size", "expand", "conv_kernel", "time_step_rank"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} is {getattr(config, field)}; it must be 1 or more")
    if (kind := getattr(config, "ssm_state_dtype", None)) not in (None, "float32", "bfloat16"):
        raise ValueError(f"ssm_state_dtype is {brief(kind)}; use None (float32) or 'bfloat16'")
    if config.num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}; it must be 0 or more")
    if config.time_step_init_scheme not in ("random", "constant"):
        raise ValueError(f"time_step_init_scheme is {brief(config.time_step_init_scheme)}; use 'random' or 'constant'")
    if not 0 < config.time_step_min <= config.time_step_max:
        raise ValueError(
            f"time_step_min {config.time_step_min} and time_step_max {config.time_step_max} must satisfy 0 < min <= max"
        )
