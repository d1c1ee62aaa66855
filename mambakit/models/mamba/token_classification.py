"""MambaForTokenClassification: a linear head on every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.models.documents import Marks, given_marks
from mambakit.models.inputs import IGNORE, require_labels
from mambakit.models.mamba.configuration import MambaConfig
from mambakit.models.mamba.modeling import MambaModel
from mambakit.models.outputs import MambaTokenClassifierOutput
from mambakit.models.pretrained import MambaPreTrainedModel
from mambakit.modules import StateCache


class MambaForTokenClassification(MambaPreTrainedModel):
    """`MambaModel` with a linear head (``score``) on the state after each token.

    A token's scores depend on it and on those before it. Where what follows counts, too, use a bidirectional model.
    """

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
    ) -> MambaTokenClassifierOutput | tuple:
        """Class scores (b, l, labels) of every token. Arguments not listed are `MambaModel.forward`'s.

        ``labels`` (b, l) int64: -100 and padding add no loss. ``num_items_in_batch`` divides the summed loss in place
        of the number of labels.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        marks = Marks(position_ids, cu_seqlens, seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            **given_marks(marks),
        )
        logits = self.score(output.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels, attention_mask, num_items_in_batch)
        result = MambaTokenClassifierOutput(
            loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states
        )
        return result if return_dict else result.to_tuple()


def token_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items: Tensor | int | None) -> Tensor:
    """Cross entropy () of labels (b, l) at their own tokens; -100 and padding add none.

    Raises:
        TypeError, ValueError: labels that are no tensor, or of another shape than the tokens.
    """
    require_labels(labels, logits.shape[:2], "; each token has one")
    labels = labels.to(logits.device)
    if attention_mask is not None:
        labels = torch.where(attention_mask[:, -labels.shape[1] :].to(labels.device).bool(), labels, IGNORE)
    reduction = "mean" if num_items is None else "sum"
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items
