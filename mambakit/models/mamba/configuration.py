"""Configurations: transformers' fields, names and defaults, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from mambakit.models.mamba.initialization import UNSET_RANGE, uses_mamba_ssm_recipe
from mambakit.modules.mixers import MIXERS, Mixer, state_spec
from mambakit.modules.state_spec import StateSpec
from mambakit.quoting import brief

# Of the fields of an output those that Trainer cannot gather, whatever a release of transformers calls them.
_CACHE_NAMES = ["cache_params", "past_key_values", "cache"]


class MambaConfig(transformers.MambaConfig):
    """Configuration of a Mamba model. Every field is transformers' `MambaConfig`'s, with its default and meaning.

    Three notes on meaning:

    - ``initializer_range``: when it is given (by the caller or by a loaded file), a new model's linear layers and
      embeddings are drawn from N(0, initializer_range), as in transformers. When it is not, a new model starts as
      mamba_ssm's does, whose first loss is near ln(vocab_size); see `mambakit.models.mamba.initialization`.
    - ``rescale_prenorm_residual``: of new weights alone, like ``time_step_min`` and the others that start them. A model is saved with
      false, so a configuration read from a checkpoint starts a new model without it unless it is set again.
    - ``use_mambapy`` and ``use_associative_scan`` choose between transformers' slow paths. mambakit has one forward;
      the fields are read and kept, and change nothing.
    """

    keys_to_ignore_at_inference = _CACHE_NAMES
    initializer_range: float = UNSET_RANGE

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The configuration of a checkpoint in either format, checked; see `mambakit.models.checkpoints.formats`."""
        return _read(cls, pretrained_model_name_or_path, kwargs)

    def mixer_class(self, layer_idx: int) -> type[Mixer]:
        """The sequence mixer of layer ``layer_idx``."""
        return MIXERS["mamba"]

    def state_spec(self, dtype: torch.dtype | str | None = None) -> StateSpec:
        """What a model's state is made of, layer by layer: names, shapes per slot and dtypes; ``dtype`` is the model's, the
        configuration's when None."""
        return state_spec(self, dtype)

    def to_dict(self) -> dict[str, Any]:
        return _without_unset_range(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return _without_unset_range(super().to_diff_dict())


class FalconMambaConfig(transformers.FalconMambaConfig):
    """Configuration of a FalconMamba model: Mamba with a weight-less RMSNorm (``mixer_rms_eps``) on dt, B and C."""

    keys_to_ignore_at_inference = _CACHE_NAMES
    initializer_range: float = UNSET_RANGE

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The configuration of a checkpoint in either format, checked; see `mambakit.models.checkpoints.formats`."""
        return _read(cls, pretrained_model_name_or_path, kwargs)

    def mixer_class(self, layer_idx: int) -> type[Mixer]:
        """The sequence mixer of layer ``layer_idx``."""
        return MIXERS["mamba"]

    def state_spec(self, dtype: torch.dtype | str | None = None) -> StateSpec:
        """What a model's state is made of, layer by layer: names, shapes per slot and dtypes; ``dtype`` is the model's, the
        configuration's when None."""
        return state_spec(self, dtype)

    def to_dict(self) -> dict[str, Any]:
        return _without_unset_range(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return _without_unset_range(super().to_diff_dict())


@contextmanager
def for_weights_that_exist(config: Any) -> Iterator[None]:
    """Within it ``config`` is what a checkpoint's config.json is to say: every reader leaves the weights as they are stored.

    Of the fields that start weights, transformers (5.17 to 5.24) applies one to weights that it has loaded: where
    ``rescale_prenorm_residual`` is true, out_proj is divided by sqrt(layers) each time.
    """
    given = config.rescale_prenorm_residual
    config.rescale_prenorm_residual = False
    try:
        yield
    finally:
        config.rescale_prenorm_residual = given


def _read(cls: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> Any:
    from mambakit.models.checkpoints.formats import read_config  # which makes these classes
    from mambakit.models.checkpoints.storage import HUB_ARGUMENTS, small_files

    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    wants_unused = kwargs.pop("return_unused_kwargs", False)
    for internal in ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "proxies"):
        kwargs.pop(internal, None)
    config, unused = read_config(small_files(name, **hub), cls, **kwargs)
    config.name_or_path = str(name)
    return (config, unused) if wants_unused else config


def _check(config: MambaConfig | FalconMambaConfig) -> None:
    for field in ("vocab_size", "hidden_size", "state_size", "expand", "conv_kernel", "time_step_rank"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} is {getattr(config, field)}; it must be 1 or more")
    if config.num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}; it must be 0 or more")
    if config.time_step_init_scheme not in ("random", "constant"):
        raise ValueError(f"time_step_init_scheme is {brief(config.time_step_init_scheme)}; use 'random' or 'constant'")
    if not 0 < config.time_step_min <= config.time_step_max:
        raise ValueError(
            f"time_step_min {config.time_step_min} and time_step_max {config.time_step_max} must satisfy 0 < min <= max"
        )


def _without_unset_range(fields: dict[str, Any]) -> dict[str, Any]:
    """A range that nobody gave is not written, or a later reader would take it for given."""
    if "initializer_range" in fields and uses_mamba_ssm_recipe(fields["initializer_range"]):
        del fields["initializer_range"]
    return fields
