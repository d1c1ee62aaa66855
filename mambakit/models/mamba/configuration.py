"""MambaConfig: transformers' fields, names and defaults, checked when it is made."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from mambakit.models import configuration as shared
from mambakit.modules.mixers import MIXERS, Mixer, state_spec
from mambakit.modules.state_spec import StateSpec


class MambaConfig(transformers.MambaConfig):
    """Configuration of a Mamba model. Every field but one is transformers' `MambaConfig`'s, with its default and
    meaning.

    - ``ssm_state_dtype``: "bfloat16" keeps the SSM states of inference in half of the memory, rounded after every
      call; None, the default, is float32. docs/concepts/state.md has the error. A step of many rows on a GPU is
      faster then; decoders that do not read such states say so (`mambakit env`).

    Three notes on meaning:

    - ``initializer_range``: when it is given (by the caller or by a loaded file), a new model's linear layers and
      embeddings are drawn from N(0, initializer_range), as in transformers. When it is not, a new model starts as
      mamba_ssm's does, whose first loss is near ln(vocab_size); see `mambakit.models.mamba.initialization`.
    - ``rescale_prenorm_residual`` concerns new weights only, like ``time_step_min`` and the other initial values. A
      model is saved with false, so a configuration read from a checkpoint starts a new model without it unless it is
      set again.
    - ``use_mambapy`` and ``use_associative_scan`` choose between transformers' slow paths. mambakit has one forward;
      the fields are read and kept, and change nothing.
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
        """Each layer's state tensors: names, shapes of one slot and dtypes.

        Args:
            dtype: the model's; the configuration's when None.
        """
        return state_spec(self, dtype)

    def to_dict(self) -> dict[str, Any]:
        return shared.without_unset_range(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return shared.without_unset_range(super().to_diff_dict())
