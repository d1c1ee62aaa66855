"""What the models return: transformers' ModelOutput, so that fields, keys and tuples all work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from mambakit.modules import MambaCache


@dataclass
class MambaOutput(ModelOutput):
    """Output of `MambaModel`.

    Attributes:
        last_hidden_state: (b, l, h), after the final norm.
        cache_params: the state after the last token.
        hidden_states: layers + 1 tensors (b, l, h): the residual stream after each layer, then ``last_hidden_state``.
    """

    last_hidden_state: Tensor | None = None
    cache_params: MambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaCausalLMOutput(ModelOutput):
    """Output of `MambaForCausalLM`: ``loss`` (), ``logits`` (b, l, v) float32, and the fields of `MambaOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaSequenceClassifierOutput(ModelOutput):
    """Output of `MambaForSequenceClassification`: ``loss`` (), ``logits`` (b, labels), and the fields of `MambaOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
