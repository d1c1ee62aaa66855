"""ln p of given tokens: from hidden states, of many continuations of one text, and of whole texts packed into a
forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.decoding.logits import require_numbers
from mambakit.decoding.prefill import hidden_states
from mambakit.modules import StateCache
from mambakit.modules.projection import project

# Logits are formed for this many tokens at a time: with a vocabulary of 50,280 that is 51 MB of float32 on a CPU, and
# 412 MB on a GPU, where the host's launches would otherwise bound it.
LOGIT_ROWS, _LOGIT_ROWS_OF_GPUS = 256, 2048


class TokenScores(NamedTuple):
    """Scores of l tokens, each given the tokens before it; on the CPU."""

    log_probs: Tensor
    """(l,) float32, in nats."""
    likeliest: Tensor
    """(l,) bool: whether the token is the model's most probable one."""


def score_tokens(model: Any, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Scores of ``targets`` (l,) int64 from the hidden states (l, h) that predict them.

    Raises:
        LogitsError: the model's log-probabilities are NaN.
    """
    log_probs, likeliest = [], []
    for logits, wanted in _logits(model, hidden, targets):
        log_probs.append(-F.cross_entropy(logits, wanted, reduction="none"))
        likeliest.append(logits.argmax(-1) == wanted)
    return TokenScores(require_numbers(torch.cat(log_probs).cpu()), torch.cat(likeliest).cpu())


def surprise(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """-ln p of ``targets`` (l,) int64 from the hidden states (l, h) that predict them: (l,) float32, on the head's
    device, without a device-to-host sync. NaN where the logits are."""
    found = [F.cross_entropy(logits, wanted, reduction="none") for logits, wanted in _logits(model, hidden, targets)]
    return torch.cat(found) if found else hidden.new_empty(0, dtype=torch.float32)


def _logits(model: Any, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (r, v) float32, targets (r,)) of some rows at a time."""
    rows = LOGIT_ROWS if hidden.device.type == "cpu" else _LOGIT_ROWS_OF_GPUS
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = project(model.lm_head, some).float()
        yield logits, wanted.to(logits.device)


def score_after(
    model: Any,
    cache: StateCache,
    logits: Tensor,
    continuations: Sequence[Tensor],
    *,
    most_tokens: int,
    most_rows: int,
) -> Iterator[list[TokenScores]]:
    """Scores of many continuations of one text. Each starts from a copy of its state, and several are packed into a
    forward.

    A continuation's last token is not read, because nothing follows it.

    Args:
        cache: of one row, after the text; not changed.
        logits: (v,) after the text.
        continuations: (l_i,) int64 each; they may be empty.
        most_tokens: the approximate number of tokens per forward; a longer continuation is read in chunks of that size.
        most_rows: the maximum number of copies of the state at a time.

    Yields:
        The scores of the next group of continuations, in their order.
    """
    first, best = logits.log_softmax(-1).cpu(), logits.argmax().cpu()
    rows = [tokens.to(torch.long) for tokens in continuations]
    for group in groups(rows, list(map(len, rows)), most_tokens, most_rows):
        parts = [[(first[begin := tokens[:1].cpu()], best == begin)] for tokens in group]
        at = [1] * len(group)
        forks = cache.select([0] * len(group))
        unread = [tokens[:-1].to(model.device) for tokens in group]
        for hidden in hidden_states(model, unread, forks, chunk_size=most_tokens):
            lengths = list(map(len, hidden))
            targets = [tokens[a : a + n] for tokens, a, n in zip(group, at, lengths, strict=True)]
            found = score_tokens(model, torch.cat(hidden), torch.cat(targets))
            for part, scores in zip(parts, zip(*(t.split(lengths) for t in found), strict=True), strict=True):
                part.append(scores)
            at = [a + n for a, n in zip(at, lengths, strict=True)]
        whole = [[torch.cat(column) for column in zip(*part, strict=True)] for part in parts]
        yield [TokenScores(require_numbers(log_probs), likeliest) for log_probs, likeliest in whole]


def score_packed(
    model: Any, pairs: Sequence[tuple[Tensor, Tensor]], state: StateCache | None = None
) -> list[TokenScores]:
    """Scores of continuations after their contexts: whole texts packed into one forward, each from the same state.

    Args:
        pairs: (context, continuation), (l_i,) int64 of one token or more each.
        state: of one row, before each text; it is not changed. None: zeros.

    Returns:
        The scores of each continuation.
    """
    texts = [torch.cat([context, continuation[:-1]]).to(model.device) for context, continuation in pairs]
    copies = None if state is None else state.select([0] * len(texts))
    (hidden,) = hidden_states(model, texts, copies, chunk_size=sum(map(len, texts)))
    predicting = [h[len(context) - 1 :] for h, (context, _) in zip(hidden, pairs, strict=True)]
    targets = torch.cat([continuation for _, continuation in pairs])
    found, lengths = score_tokens(model, torch.cat(predicting), targets), [len(c) for _, c in pairs]
    return [TokenScores(*scores) for scores in zip(*(t.split(lengths) for t in found), strict=True)]


def groups(items: Sequence[Any], lengths: Sequence[int], most_tokens: int, most_rows: int = 0) -> Iterator[list[Any]]:
    """Consecutive groups of ``items``, whose lengths sum to at most ``most_tokens`` (except for a single longer item).

    Args:
        most_rows: the maximum number of items of a group; 0: any.
    """
    group: list[Any] = []
    size = 0
    for item, length in zip(items, lengths, strict=True):
        if group and (size + length > most_tokens or len(group) == most_rows):
            yield group
            group, size = [], 0
        group.append(item)
        size += length
    if group:
        yield group
