"""Log-probabilities of a prompt's tokens and of the most probable alternatives; `echo` for the completions API."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import SCORING_CHUNK
from mambakit.decoding.logits import require_numbers
from mambakit.decoding.prefill import hidden_states
from mambakit.generation.state import State
from mambakit.generation.token_ids import text_ids
from mambakit.generation.token_scores import LOGIT_ROWS
from mambakit.generation.token_texts import TokenTexts
from mambakit.modules.projection import project
from mambakit.quoting import brief


@dataclass(frozen=True)
class TokenLogProbs:
    """ln p of every token of a sequence (l,), given those before it."""

    ids: Tensor
    """(l,) int64."""
    log_probs: Tensor
    """(l,) float32; NaN for a first token without a context."""
    top_ids: Tensor
    """(l, top) int64, the likeliest tokens at each position, best first."""
    top_log_probs: Tensor
    """(l, top) float32; NaN at a first token without a context."""


@torch.no_grad()
def token_log_probs(
    model: Any,
    ids: Tensor | Sequence[int],
    *,
    top: int = 0,
    before: int | None = None,
    state: State | None = None,
    chunk_size: int = SCORING_CHUNK,
    progress: Callable[[int], None] | None = None,
) -> TokenLogProbs:
    """Prompt log-probabilities, at constant memory.

    Args:
        ids: (l,) int64, of any length.
        top: number of alternatives at each position.
        before: a token before the first one (end-of-text), so that the first one is scored, too.
        state: the state after what was read before, instead of ``before``; it is not changed.
        chunk_size: tokens per forward.
        progress: called with the number of tokens done.

    Raises:
        ValueError: both ``before`` and ``state``; no tokens; ``top`` outside 0 to the vocabulary's size; chunk_size
            below 1; a token outside of the vocabulary.
        TypeError: tokens that are no whole numbers.
    """
    vocabulary = model.config.vocab_size
    ids = text_ids("ids", ids, vocabulary).to(model.device)
    if not isinstance(top, numbers.Integral) or not 0 <= top <= vocabulary:
        raise ValueError(f"top is {brief(top)}; it must be between 0 and the vocabulary's {vocabulary}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {brief(chunk_size)}; it must be 1 or more")
    if before is not None and state is not None:
        raise ValueError("before and state both say what comes first; give one")
    after = {"prompt_ids": ids[:0], "cache": model.backbone.new_cache(1)} if state is None else state.prompt()
    lead = after["prompt_ids"] if before is None else ids.new_tensor([before])
    inputs, targets = torch.cat([lead, ids])[:-1], ids[1 - len(lead) :]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    if not len(lead):
        nothing = torch.full((1, 1 + top), math.nan, dtype=torch.float32, device="cpu")
        parts.append((nothing[:, 0], torch.full((1, top), -1, dtype=torch.int64, device="cpu"), nothing[:, 1:]))
    at = 0
    for (hidden,) in hidden_states(model, [inputs], after["cache"], chunk_size=chunk_size, progress=progress):
        wanted = targets[at : at + len(hidden)]
        at += len(hidden)
        parts += [found[1:] for found in score_alternatives(model, hidden, wanted, top)]
    log_probs, top_ids, top_log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLogProbs(ids.cpu(), log_probs, top_ids, top_log_probs)


def score_alternatives(
    model: Any, hidden: Tensor, targets: Tensor, top: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Log-probabilities of ``targets`` (l,) int64 and of the likeliest tokens, from the hidden states (l, h) that
    predict them.

    Yields:
        Of some tokens at a time, on the CPU: the targets (r,), their ln p (r,) float32, and the ``top`` likeliest
        tokens (r, top) int64 with their ln p (r, top) float32, best first.

    Raises:
        LogitsError: the model's log-probabilities are NaN.
    """
    for rows, these in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        log_probs = project(model.lm_head, rows).float().log_softmax(-1)
        best = log_probs.topk(top)
        own = require_numbers(log_probs.gather(1, these[:, None])[:, 0].cpu())
        yield these.cpu(), own, best.indices.cpu(), best.values.cpu()


def echo(
    model: Any, tokenizer: Any, ids: Tensor | Sequence[int], *, top: int = 0, chunk_size: int = SCORING_CHUNK
) -> dict[str, list]:
    """A text given back with its tokens' log-probabilities: the ``logprobs`` of the completions API with ``echo``.

    Args:
        ids: (l,) int64, a prompt, with or without what was written after it.
        top: alternatives at each place.

    Returns:
        Lists of l: ``tokens`` (text), ``token_logprobs`` (None for the first, which nothing precedes), ``top_logprobs``
        ({text: ln p} or None) and ``text_offset`` (characters before the token). A character that takes several tokens
        is spelled ``bytes:\\xe6`` in its parts, as that API does. No number is infinite: -9999.0 stands for it.
    """
    return as_logprobs(tokenizer, token_log_probs(model, ids, top=top, chunk_size=chunk_size))


def as_logprobs(tokenizer: Any, scored: TokenLogProbs, offset: int = 0) -> dict[str, list]:
    """The ``logprobs`` object of the completions API; ``offset`` characters stand before the first token."""
    texts = TokenTexts(tokenizer)
    offsets = [offset + at for at in texts.offsets(scored.ids.tolist())]
    text = texts.text
    finite = functools.partial(max, -9999.0)
    unknown = scored.log_probs.isnan().tolist()
    top = zip(unknown, scored.top_ids.tolist(), scored.top_log_probs.tolist(), strict=True)
    return {
        "tokens": [text(token) for token in scored.ids.tolist()],
        "token_logprobs": [None if u else finite(x) for u, x in zip(unknown, scored.log_probs.tolist(), strict=True)],
        "top_logprobs": [
            None if u else {text(t): finite(x) for t, x in zip(ids, values, strict=True)} for u, ids, values in top
        ],
        "text_offset": offsets,
    }
