"""A Mamba language model for inference alone: no PreTrainedModel, whose import takes as long as torch's own.

The command line loads it, and starts in half the time. Modules, names and results are those of `MambaForCausalLM`; what
transformers adds (``generate``, ``save_pretrained``, training, placement on several devices) is not there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.checkpoints.loading import load_pretrained
from mambakit.models.checkpoints.storage import read_tensors, weight_files
from mambakit.models.documents import Marks
from mambakit.models.mamba.forward import backbone_forward, cache_of, language_model_forward, only_calls_its_layers
from mambakit.models.mamba.inference_config import EndTokens
from mambakit.models.quantization import is_quantized
from mambakit.modules import MambaBlock, RMSNorm, StateCache

# Parameters that stay float32 in a model of a half dtype, as in `MambaPreTrainedModel`.
_FLOAT32 = ("A_log", "mixer.D", "dt_proj.bias")


@dataclass
class _Output:
    """The state under its three names, and the fields that are not None as a tuple. Abstract."""

    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def cache_params(self) -> StateCache | None:
        return self.cache

    @property
    def past_key_values(self) -> StateCache | None:
        return self.cache

    def to_tuple(self) -> tuple:
        values = [getattr(self, field.name) for field in fields(self)]
        return tuple(value for value in (*values[2:], *values[:2]) if value is not None)


@dataclass
class InferenceOutput(_Output):
    """As `MambaOutput`."""

    last_hidden_state: Tensor | None = None


@dataclass
class InferenceCausalLMOutput(_Output):
    """As `MambaCausalLMOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class InferenceBackbone(nn.Module):
    """Embeddings, layers and final norm."""

    output_type = InferenceOutput
    gradient_checkpointing = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        # Not drawn: nothing is, and on meta torch would load torch._dynamo to draw from a normal distribution.
        table = torch.empty(
            config.vocab_size, config.hidden_size, dtype=torch.float32, device=torch.get_default_device()
        )
        self.embeddings = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def new_cache(self, batch_size: int) -> StateCache:
        """A zero state for ``batch_size`` rows, in this model's dtype, where its layers compute."""
        return cache_of(self, batch_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> InferenceOutput | tuple:
        """As `MambaModel.forward`."""
        marks = Marks(None, cu_seqlens, None, None, None, None, None)
        return backbone_forward(
            self, input_ids, inputs_embeds, cache_params, use_cache, output_hidden_states, return_dict, attention_mask,
            marks, output_attentions,
        )  # fmt: skip


class _Assigned(nn.Module):
    """The end of `load_pretrained`: checked tensors become the model's."""

    @classmethod
    def from_pretrained(
        cls, folder: str | None, *, config: Any, dtype: torch.dtype | str, state_dict: dict[str, Tensor] | None = None
    ) -> Any:
        """The model with the tensors of ``state_dict``, or else of the files in ``folder``, under its own names."""
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            model: Any = cls(config)
        stored = read_tensors(weight_files(Path(str(folder)))) if state_dict is None else state_dict
        # Copied: a file's tensors are the file's own memory.
        tensors = {
            name: stored[name].to(torch.float32 if name.endswith(_FLOAT32) and kind.itemsize < 4 else kind, copy=True)
            for name in model.state_dict()
            if name in stored
        }
        model.load_state_dict(tensors, strict=False, assign=True)  # `load_pretrained` has checked the names
        if config.tie_word_embeddings:
            model.lm_head.weight = model.backbone.embeddings.weight
        return model


class InferenceCausalLM(_Assigned):
    """A backbone with a language modelling head.

    Attributes:
        config: an `InferenceConfig`, or a configuration of `mambakit.models`.
        generation_config: of the checkpoint; transformers' where its generation_config.json is more than tokens.
    """

    output_type = InferenceCausalLMOutput

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.generation_config = EndTokens(config.bos_token_id, config.eos_token_id, config.pad_token_id)
        self.backbone = InferenceBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def loads(config: Any) -> bool:
        """Whether it can be loaded with this configuration: not where transformers must unpack the weights."""
        return getattr(config, "quantization_config", None) is None or is_quantized(config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | os.PathLike, *, config: Any, dtype: torch.dtype | str | None = None
    ) -> Any:
        """A checkpoint of any format, in eval mode on the CPU.

        Args:
            config: of the checkpoint, by `InferenceConfig.of` or `mambakit.AutoConfig`.
            dtype: of the weights, as in transformers.

        Raises:
            CheckpointError: a file is missing, damaged, holds code, or does not fit the configuration.
        """
        generation = getattr(config, "generation", None)
        model = load_pretrained(cls, name, config=config, dtype=dtype, generation_config=generation)
        config.dtype = model.dtype
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.backbone.norm_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm_f.weight.dtype

    def can_generate(self) -> bool:
        """`load_pretrained` asks whether the model takes a generation configuration."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def is_its_layers(self) -> bool:
        """Whether a call of the model only calls its layers in order, so that a caller may pause between them."""
        return only_calls_its_layers(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: StateCache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
    ) -> InferenceCausalLMOutput | tuple:
        """As `MambaForCausalLM.forward`."""
        marks = Marks(None, cu_seqlens, None, None, None, None, None)
        return language_model_forward(
            self, input_ids, attention_mask, inputs_embeds, cache_params, None, output_hidden_states, return_dict,
            use_cache, logits_to_keep, marks, None, None, None,
        )  # fmt: skip
