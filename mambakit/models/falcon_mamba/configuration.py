"""FalconMambaConfig: transformers' fields, names and defaults, checked when it is made."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from mambakit.models import configuration as shared
from mambakit.modules.mixers import MIXERS, Mixer, state_spec
from mambakit.modules.state_spec import StateSpec


class FalconMambaConfig(transformers.FalconMambaConfig):
    """Configuration of a FalconMamba model: Mamba with a weight-less RMSNorm (``mixer_rms_eps``) on dt, B and C.

    The notes on fields are `MambaConfig`'s.
    """

    keys_to_ignore_at_inference = shared.IGNORED_AT_INFERENCE
    initializer_range: float = shared.UNSET_RANGE
    ssm_state_dtype: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        shared.check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The configuration of a checkpoint in any format (`mambakit.models.checkpoints`), checked."""
        return shared.read(cls, pretrained_model_name_or_path, kwargs)

    def mixer_class(self, layer_idx: int) -> type[Mixer]:
        """The sequence mixer of layer ``layer_idx``."""
        return MIXERS["mamba"]

    def state_spec(self, dtype: torch.dtype | str | None = None) -> StateSpec:
        """As `MambaConfig.state_spec`."""
        return state_spec(self, dtype)

    def to_dict(self) -> dict[str, Any]:
        return shared.without_unset_range(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return shared.without_unset_range(super().to_diff_dict())
