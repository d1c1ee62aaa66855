"""The configuration of a Mamba or FalconMamba checkpoint for inference alone, read without transformers.

transformers takes as long to import as torch does. What this cannot read as transformers does (a field that it does not
know, a value that transformers would refuse, an activation of transformers') it leaves to transformers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mambakit.models.checkpoints.configuration import read_fields
from mambakit.models.checkpoints.fields import check_config, check_generation
from mambakit.models.checkpoints.storage import holds_adapters, locate, read_config, resolve
from mambakit.models.configuration import check
from mambakit.models.families import classifier_of
from mambakit.models.quantization import is_quantized
from mambakit.modules.mixers import MIXERS, Mixer, state_spec
from mambakit.modules.state_spec import StateSpec
from mambakit.reading import read_json

# Fields of config.json that inference does not read: of training, of transformers, of state-spaces' first conversions.
_UNREAD = {
    "architectures", "transformers_version", "use_mambapy", "use_falcon_mambapy", "use_associative_scan",
    "initializer_range", "rescale_prenorm_residual", "problem_type", "id2label", "label2id", "num_labels",
    "_name_or_path", "d_inner", "d_model", "n_layer", "fused_add_norm", "rms_norm", "ssm_cfg",
    "pad_vocab_size_multiple",
}  # fmt: skip
# Of generation_config.json: the tokens, and what changes no text. Others are transformers' to check.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HARMLESS = {"transformers_version", "use_cache", "output_attentions", "output_hidden_states", "_from_model_config"}
_RMS_EPS = 1e-6  # FalconMamba's


@dataclass
class EndTokens:
    """What of a generation configuration the command line reads: the tokens that begin, end and pad a text."""

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


@dataclass
class InferenceConfig:
    """The fields of transformers' `MambaConfig` and `FalconMambaConfig` that inference reads, with their defaults.

    Attributes:
        intermediate_size: d, computed.
        generation: the checkpoint's.
    """

    model_type: str
    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    mixer_rms_eps: float | None = None
    expand: int = 2
    conv_kernel: int = 4
    time_step_rank: int | str = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True
    output_hidden_states: bool = False
    return_dict: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    dtype: torch.dtype | None = None
    ssm_state_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    name_or_path: str = ""
    generation: EndTokens = field(default_factory=EndTokens)
    intermediate_size: int = field(init=False)

    def __post_init__(self) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = -(-self.hidden_size // 16)
        if self.model_type == "falcon_mamba" and self.mixer_rms_eps is None:
            self.mixer_rms_eps = _RMS_EPS
        self.intermediate_size = self.expand * self.hidden_size

    @classmethod
    def of(cls, name: str | os.PathLike) -> InferenceConfig | None:
        """The configuration of a checkpoint in any format; None where transformers must read it.

        Raises:
            CheckpointError: config.json or generation_config.json has a value that none may have.
        """
        if holds_adapters(locate(name)):
            return None
        folder = resolve(name)
        path = read_config(folder)[1]
        given = dict(check_config(read_fields(folder), path, None))
        config = None if classifier_of(given.get("architectures")) else _made(given)
        if config is None:
            return None
        generation = _generation(folder, config)
        if generation is None:
            return None
        config.name_or_path, config.generation = str(name), generation
        return config

    def mixer_class(self, layer_idx: int) -> type[Mixer]:
        """The sequence mixer of layer ``layer_idx``."""
        return MIXERS["mamba"]

    def state_spec(self, dtype: torch.dtype | str | None = None) -> StateSpec:
        """As `MambaConfig.state_spec`."""
        return state_spec(self, dtype)


def _made(given: dict[str, Any]) -> InferenceConfig | None:
    older, inner = given.pop("torch_dtype", None), given.pop("intermediate_size", None)
    dtype = given.pop("dtype", None) or older
    known = {one.name for one in fields(InferenceConfig) if one.init} - {"name_or_path", "generation"}
    if given["model_type"] not in ("mamba", "falcon_mamba") or given.keys() - known - _UNREAD:
        return None
    if given["model_type"] == "mamba" and "mixer_rms_eps" in given:
        return None
    config = InferenceConfig(
        **{name: value for name, value in given.items() if name in known},
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    packed = config.quantization_config is None or is_quantized(config)
    if not packed or config.hidden_act not in ("silu", "swish") or inner not in (None, config.intermediate_size):
        return None
    if any(getattr(config, name) is None for name in ("output_hidden_states", "return_dict")):
        return None
    try:
        check(config)
    except ValueError:  # as a CheckpointError it is transformers' to raise
        return None
    return config


def _generation(folder: Path, config: InferenceConfig) -> EndTokens | None:
    path = folder / "generation_config.json"
    if not path.exists():
        return EndTokens(*(getattr(config, name) for name in _TOKENS))
    given = check_generation(read_json(path), path, None)
    if given.keys() - {*_TOKENS, *_HARMLESS}:
        return None
    return EndTokens(**{name: given.get(name) for name in _TOKENS})
