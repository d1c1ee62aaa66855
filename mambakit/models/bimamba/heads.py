"""Heads on a model that reads in both directions: masked tokens, labels of tokens, labels of texts.

With a complement, heads see both strands: logits of the masked language model are equivariant to the reverse
complement, those of the classifiers are the same at the same place of either strand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.bimamba.configuration import BiMambaConfig
from mambakit.models.bimamba.modeling import BiMambaModel
from mambakit.models.mamba.token_classification import token_loss
from mambakit.models.outputs import MambaCausalLMOutput, MambaSequenceClassifierOutput, MambaTokenClassifierOutput
from mambakit.models.pretrained import MambaPreTrainedModel


class _WithBackbone(MambaPreTrainedModel):
    """A head on `BiMambaModel`. Abstract."""

    config_class = BiMambaConfig
    _no_split_modules = ["BiMambaBlock"]

    def __init__(self, config: BiMambaConfig):
        super().__init__(config)
        self.backbone = BiMambaModel(config)

    def quantize(self, format: str, group: int | None = None) -> Any:
        return self.backbone.quantize(format, group)

    def _strands(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """(b, l, h) of each strand."""
        return (hidden,) if self.config.complement is None else hidden.chunk(2, -1)


class BiMambaForMaskedLM(_WithBackbone):
    """Logits (b, l, v) of the token at each place, tied to the embeddings unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: BiMambaConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MambaCausalLMOutput | tuple:
        """Logits (b, l, v) float32. Arguments not listed are `BiMambaModel.forward`'s.

        ``labels`` (b, l) int64 are the tokens at their own places, -100 where none was masked.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output = self.backbone(
            input_ids, attention_mask, inputs_embeds, cu_seqlens, output_hidden_states, return_dict=True
        )
        strand, *other = self._strands(output.last_hidden_state)
        logits = self.lm_head(strand)
        for hidden in other:  # the complement of a token has its column on the other strand
            every = torch.arange(self.config.vocab_size, dtype=torch.int64, device=logits.device)
            logits = logits + self.lm_head(hidden)[..., self.backbone.complement_of(every)]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = None if labels is None else token_loss(logits, labels, attention_mask, num_items_in_batch)
        result = MambaCausalLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if return_dict else result.to_tuple()


class BiMambaForTokenClassification(_WithBackbone):
    """Scores (b, l, labels) of each token; of both strands their mean."""

    def __init__(self, config: BiMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MambaTokenClassifierOutput | tuple:
        """As `MambaForTokenClassification.forward`; arguments are `BiMambaForMaskedLM.forward`'s."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output = self.backbone(
            input_ids, attention_mask, inputs_embeds, cu_seqlens, output_hidden_states, return_dict=True
        )
        logits = self.score(torch.stack(self._strands(output.last_hidden_state)).mean(0))
        loss = None if labels is None else token_loss(logits, labels, attention_mask, num_items_in_batch)
        result = MambaTokenClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if return_dict else result.to_tuple()


class BiMambaForSequenceClassification(_WithBackbone):
    """Scores (b, labels) of a text: a linear head on the mean of its tokens' states, of both strands."""

    def __init__(self, config: BiMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MambaSequenceClassifierOutput | tuple:
        """``labels`` (b,) int64. A row is one text; arguments not listed are `BiMambaModel.forward`'s."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output = self.backbone(input_ids, attention_mask, inputs_embeds, None, output_hidden_states, return_dict=True)
        hidden = torch.stack(self._strands(output.last_hidden_state)).mean(0)
        if attention_mask is None:
            pooled = hidden.mean(1)
        else:
            keep = attention_mask.to(hidden.device).bool()
            pooled = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        logits = self.score(pooled.to(self.score.weight.dtype))
        loss = None
        if labels is not None:
            labels = labels.to(logits.device).view(-1)
            loss = token_loss(logits[:, None], labels[:, None], None, num_items_in_batch)
        result = MambaSequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result if return_dict else result.to_tuple()
