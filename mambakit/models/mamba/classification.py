"""MambaForSequenceClassification: a linear head on the last real token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.documents import Marks, begin_inside, documents_of, given_marks
from mambakit.models.inputs import one_cache, require_inputs
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.mamba.modeling import MambaModel
from mambakit.models.outputs import MambaSequenceClassifierOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import StateCache
from mambakit.modules.tracing import values_are_hidden


class MambaForSequenceClassification(MambaPreTrainedModel):
    """`MambaModel` with a linear head (``score``) on the state of the last real token."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = MambaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: StateCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        past_key_values: StateCache | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: StateCache | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> MambaSequenceClassifierOutput | tuple:
        """Class scores (b, labels) from the last token that ``attention_mask`` keeps.

        Without a mask, the last token that is not ``pad_token_id`` counts; a row of nothing but padding is an error.
        ``labels`` (b,) int64 classifies, float regresses with one label, and (b, labels) float is multi-label; the
        configuration's ``problem_type`` decides where it is set. Arguments not listed are `MambaModel.forward`'s. A row
        is one document; arguments that mark several in a row raise.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        require_inputs(input_ids, inputs_embeds)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            padding = input_ids == self.config.pad_token_id
            # Trailing padding only: before it the same id may be a real token (a separator).
            trailing = padding.flip(1).cumprod(1).flip(1).bool()
            needed = values_are_hidden(trailing) or bool(trailing.any())
            attention_mask = (~trailing).to(torch.int64) if needed else None
        marks = Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        cache = one_cache(cache=cache, cache_params=cache_params, past_key_values=past_key_values)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and (given_marks(marks) or attention_mask is not None):
            _require_one_document(tokens, attention_mask, marks, cache)
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            **given_marks(marks),
        )
        hidden = output.last_hidden_state
        b, length = hidden.shape[:2]
        if attention_mask is None:
            pooled = hidden[:, -1]
        else:
            keep = attention_mask[:, -length:].to(hidden.device).bool()
            if not values_are_hidden(keep) and not bool(keep.any(1).all()):
                raise ValueError("a row has no real token to pool on; drop the row or correct attention_mask")
            positions = torch.arange(length, dtype=torch.int64, device=hidden.device)
            pooled = hidden[torch.arange(b, dtype=torch.int64, device=hidden.device), (positions * keep).argmax(1)]
        logits = self.score(pooled)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device), num_items_in_batch)
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


def _require_one_document(
    tokens: Tensor, attention_mask: Tensor | None, marks: Marks, cache: StateCache | None
) -> None:
    if values_are_hidden(tokens, attention_mask, *marks):
        return
    seen = 0 if cache is None else cache.get_seq_length()
    keep, starts = documents_of((tokens.shape[0], tokens.shape[1]), tokens.device, attention_mask, marks, seen)
    inside = None if starts is None else begin_inside(starts, keep)
    if inside is not None and bool(inside.any()):
        row, column = inside.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} holds several documents (one begins at token {column}), and a classifier scores one of each "
            "row; give every document a row of its own, padded and with attention_mask"
        )
