"""MambaForSequenceClassification: a linear head on the last real token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.configuration import MambaConfig
from mambakit.models.mamba import MambaModel
from mambakit.models.outputs import MambaSequenceClassifierOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import MambaCache


class MambaForSequenceClassification(MambaPreTrainedModel):
    """`MambaModel` with a linear head (``score``) on the state of the last real token."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = MambaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        past_key_values: MambaCache | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: MambaCache | None = None,
    ) -> MambaSequenceClassifierOutput | tuple:
        """Class scores (b, labels) from the last token that ``attention_mask`` keeps.

        Without a mask, the last token that is not ``pad_token_id`` counts; a row of nothing but padding is an error.
        ``labels`` (b,) int64 classifies, float regresses with one label, and (b, labels) float is multi-label; the
        configuration's ``problem_type`` decides where it is set.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            padding = input_ids == self.config.pad_token_id
            # Trailing padding only: the same id may well be a real token (a separator) further in front.
            trailing = padding.flip(1).cumprod(1).flip(1).bool()
            attention_mask = (~trailing).to(torch.int64) if bool(trailing.any()) else None
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            output_attentions=output_attentions,
        )
        hidden = output.last_hidden_state
        b, length = hidden.shape[:2]
        if attention_mask is None:
            pooled = hidden[:, -1]
        else:
            keep = attention_mask[:, -length:].to(hidden.device).bool()
            if not bool(keep.any(1).all()):
                raise ValueError("a row has no real token to pool on; drop the row or correct attention_mask")
            positions = torch.arange(length, device=hidden.device)
            pooled = hidden[torch.arange(b, device=hidden.device), (positions * keep).argmax(1)]
        logits = self.score(pooled)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        result = MambaSequenceClassifierOutput(
            loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states
        )
        return result if return_dict else result.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Any) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        reduction = "mean" if num_items is None else "sum"
        logits = logits.float()
        if problem == "regression":
            loss = nn.functional.mse_loss(
                logits.squeeze(-1), labels.float().reshape(logits.squeeze(-1).shape), reduction=reduction
            )
        elif problem == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)
        else:
            loss = nn.functional.cross_entropy(logits, labels.view(-1), reduction=reduction)
        return loss if num_items is None else loss / num_items
