"""Log-likelihoods of many continuations: packed without padding, and a context that several share is read once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.decoding.prefill import prefill
from mambakit.generation.token_scores import TokenScores, groups, score_after, score_packed

# Reading a shorter context again is cheaper than copying its state.
_SHARED_CONTEXT = 32
# States held at once for the continuations of a context: 21 MB each for a model of 2.8 billion parameters.
_SHARED_ROWS = 32


class Likelihood(NamedTuple):
    """Log-likelihood of one continuation."""

    log_prob: float
    """ln p(continuation | context), in nats."""
    tokens: int
    greedy: bool
    """Every token of it is the model's likeliest."""


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 4096,
    batch_size: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) of every pair of token lists, in their order.

    Sequences of any length, without padding: short ones are packed into one row with their boundaries (`cu_seqlens`),
    long ones are read in chunks with the state carried.

    Args:
        model: a causal language model in eval mode.
        pairs: (context, continuation), each of one token or more.
        batch_tokens: tokens of a forward pass, about; memory is proportional to it.
        batch_size: at most this many sequences in a pass; 0: any number.
        progress: called with the number of pairs done since the last call.

    Raises:
        ValueError: an empty context or continuation, a token that is not the model's, or batch_tokens below 1.
    """
    if batch_tokens < 1 or batch_size < 0:
        raise ValueError(f"batch_tokens is {batch_tokens} and batch_size {batch_size}; use at least 1 and 0")
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {index} has {len(context)} tokens of context and {len(continuation)} of continuation; give each "
                "at least one (an end-of-text token begins a document)"
            )
        largest = max(*context, *continuation)
        if largest >= model.config.vocab_size:
            raise ValueError(f"pair {index} has token {largest}; the model's are 0 to {model.config.vocab_size - 1}")
        by_context.setdefault(tuple(context), []).append(index)
    results: list[Likelihood | None] = [None] * len(pairs)

    def tensor(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(list(tokens), dtype=torch.int64, device="cpu")

    def keep(indices: list[int], found: list[TokenScores]) -> None:
        for index, scores in zip(indices, found, strict=True):
            total = float(scores.log_probs.double().sum())
            results[index] = Likelihood(total, len(scores.log_probs), bool(scores.likeliest.all()))
        if progress is not None:
            progress(len(indices))

    alone: list[int] = []
    for context, indices in by_context.items():
        long = max(len(context) + len(pairs[i][1]) for i in indices) > batch_tokens
        if not long and (len(context) < _SHARED_CONTEXT or len(indices) == 1):
            alone += indices
            continue
        cache = model.backbone.new_cache(1)
        (logits,) = prefill(model, tensor(context)[None].to(model.device), cache, chunk_size=batch_tokens)
        limits = {"most_tokens": batch_tokens, "most_rows": batch_size or _SHARED_ROWS}
        rest = iter(indices)
        for group in score_after(model, cache, logits, [tensor(pairs[i][1]) for i in indices], **limits):
            keep(list(itertools.islice(rest, len(group))), group)
    alone.sort()
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in alone]
    for part in groups(alone, lengths, batch_tokens, batch_size):
        keep(part, score_packed(model, [(tensor(pairs[i][0]), tensor(pairs[i][1])) for i in part]))
    return [likelihood for likelihood in results if likelihood is not None]
