"""The likelihood of many continuations at once: packed into rows without padding, a context shared by several read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.decoding.logits import require_numbers

# Logits are formed for this many tokens at a time: with a vocabulary of 50,280 that is 51 MB of float32.
_LOGIT_ROWS = 256
# A context shorter than this is cheaper to read again than its state is to copy.
_SHARED_CONTEXT = 32
# States held at once for the continuations of a context: 21 MB each for a model of 2.8 billion parameters.
_SHARED_ROWS = 32


class Likelihood(NamedTuple):
    """Of one continuation."""

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

    Sequences of any length, without padding: short ones are packed into one row with their boundaries (`cu_seqlens`), long
    ones are read in chunks with the state carried.

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
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {index} has {len(context)} tokens of context and {len(continuation)} of continuation; give each at "
                "least one (an end-of-text token begins a document)"
            )
        largest = max(*context, *continuation)
        if largest >= model.config.vocab_size:
            raise ValueError(f"pair {index} has token {largest}; the model's are 0 to {model.config.vocab_size - 1}")
        groups.setdefault(tuple(context), []).append(index)
    results: list[Likelihood | None] = [None] * len(pairs)

    def keep(indices: list[int], found: list[Likelihood]) -> None:
        for index, likelihood in zip(indices, found, strict=True):
            results[index] = likelihood
        if progress is not None:
            progress(len(indices))

    alone: list[int] = []
    for context, indices in groups.items():
        long = max(len(context) + len(pairs[i][1]) for i in indices) > batch_tokens
        if long or (len(context) >= _SHARED_CONTEXT and len(indices) > 1):
            for part in _batches(
                indices, [len(pairs[i][1]) for i in indices], batch_tokens, batch_size or _SHARED_ROWS
            ):
                keep(part, _after_context(model, context, [pairs[i][1] for i in part], batch_tokens))
        else:
            alone += indices
    alone.sort()
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in alone]
    for part in _batches(alone, lengths, batch_tokens, batch_size):
        keep(part, _packed(model, [pairs[i] for i in part]))
    return [likelihood for likelihood in results if likelihood is not None]


def _batches(indices: list[int], lengths: list[int], most_tokens: int, most: int) -> Iterator[list[int]]:
    """Runs of ``indices`` whose lengths sum to at most ``most_tokens`` (or are alone), at most ``most`` of them (0: any)."""
    batch: list[int] = []
    tokens = 0
    for index, length in zip(indices, lengths, strict=True):
        if batch and (tokens + length > most_tokens or len(batch) == most):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


def _packed(model: Any, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """Whole sequences side by side in one row, each from a zero state."""
    tokens: list[int] = []
    cuts: list[int] = [0]
    predicting: list[int] = []
    for context, continuation in pairs:
        predicting += range(len(tokens) + len(context) - 1, len(tokens) + len(context) + len(continuation) - 1)
        tokens += [*context, *continuation[:-1]]
        cuts.append(len(tokens))
    device = model.device
    hidden = model.backbone(
        torch.tensor([tokens], dtype=torch.int64, device=device), use_cache=False,
        cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device),
    ).last_hidden_state[0]  # fmt: skip
    return _score(model, hidden[torch.tensor(predicting, dtype=torch.int64, device=device)], [c for _, c in pairs])


def _after_context(
    model: Any, context: Sequence[int], continuations: list[Sequence[int]], chunk: int
) -> list[Likelihood]:
    """Continuations of one context: it is read once, in chunks, and each of them goes on from a copy of its state."""
    device = model.device
    cache = model.backbone.new_cache(1)
    for part in torch.tensor([list(context)], dtype=torch.int64, device=device).split(chunk, 1):
        last = model.backbone(part, cache_params=cache).last_hidden_state[0, -1:]
    more = [c for c in continuations if len(c) > 1]
    rows: list[Tensor] = []
    if len(more) == 1:  # of any length: in chunks too
        ids = torch.tensor([list(more[0][:-1])], dtype=torch.int64, device=device)
        parts = [model.backbone(part, cache_params=cache).last_hidden_state[0] for part in ids.split(chunk, 1)]
        rows = [torch.cat(parts)]
    elif more:
        lengths = [len(c) - 1 for c in more]
        ids = torch.tensor([[token for c in more for token in c[:-1]]], dtype=torch.int64, device=device)
        cuts = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0).to(torch.int32)
        forks = cache.select([0] * len(more))
        hidden = model.backbone(ids, cache_params=forks, cu_seqlens=cuts).last_hidden_state[0]
        rows = list(hidden.split(lengths))
    rest = iter(rows)
    parts = [torch.cat([last, next(rest)]) if len(c) > 1 else last for c in continuations]
    return _score(model, torch.cat(parts), continuations)


def _score(model: Any, hidden: Tensor, continuations: Iterable[Sequence[int]]) -> list[Likelihood]:
    """Likelihoods from the hidden states (tokens, h) that predict the continuations' tokens, one after the other."""
    continuations = list(continuations)
    targets = torch.tensor([token for c in continuations for token in c], dtype=torch.int64, device=hidden.device)
    log_probs, likeliest = [], []
    for rows, wanted in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
        scores = model.lm_head(rows).float().log_softmax(-1)
        log_probs.append(scores.gather(1, wanted[:, None]).squeeze(1))
        likeliest.append(scores.argmax(-1) == wanted)
    lengths = [len(c) for c in continuations]
    sums = [float(part.sum()) for part in require_numbers(torch.cat(log_probs)).double().cpu().split(lengths)]
    greedy = [bool(part.all()) for part in torch.cat(likeliest).cpu().split(lengths)]
    return [Likelihood(*values) for values in zip(sums, lengths, greedy, strict=True)]
