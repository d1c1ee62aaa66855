"""``mamba_ssm.utils.generation``'s functions on logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """A token for each row of ``logits`` (b, v), or one of (v,).

    Args:
        top_k: 1 takes the likeliest token, whatever else is given, as upstream; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities sum to it; 0 keeps all.
        min_p: keep tokens at least this likely relative to the likeliest of their row; 0 keeps all. Upstream compares
            logits with token 0's, and takes one row only.
    """
    if top_k == 1:
        return logits.argmax(-1)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise ValueError(f"sample: {name} is {value}; it must be from 0 to 1")
    if temperature <= 0:
        raise ValueError(
            f"sample: temperature is {temperature}; it must be above 0 (top_k=1 takes the likeliest token)"
        )
    indices = None
    if top_k > 0:
        logits, indices = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
    logits = logits.float() / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    if min_p > 0:
        probabilities = logits.softmax(-1)
        logits.masked_fill_(probabilities < min_p * probabilities.amax(-1, keepdim=True), float("-inf"))
    chosen = torch.multinomial(logits.softmax(-1), 1)
    return (chosen if indices is None else indices.gather(-1, chosen)).squeeze(-1)


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """In place: logits below ``min_p`` become -inf, unless it is outside (0, 1)."""
    if 0 < min_p < 1:
        logits.masked_fill_(logits < min_p, float("-inf"))


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """In place: all but the ``top_k`` largest logits of a row become -inf."""
    logits.masked_fill_(logits < torch.topk(logits, top_k)[0][..., -1:], float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """In place: all but the likeliest tokens of a row whose probabilities sum to ``top_p`` become -inf, unless it is
    outside (0, 1)."""
    if not 0 < top_p < 1:
        return
    ordered, order = torch.sort(logits, dim=-1)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    logits.masked_fill_(removed.scatter(-1, order, removed), float("-inf"))


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """In place: the logits of tokens that were written are divided, negative ones multiplied, by the penalty
    (arXiv 1909.05858)."""
    if repetition_penalty == 1.0:
        return logits
    found = logits.gather(1, prev_output_tokens)
    found = torch.where(found < 0, found * repetition_penalty, found / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, found)
