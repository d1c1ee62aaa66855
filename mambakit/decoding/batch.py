"""The tokens of one `generate` call: texts that start together, decoded until all have ended.

The tokens of several steps stay on the device between two looks at whether the texts have ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.logits import NO_CHOICE, are_numbers
from mambakit.decoding.loop import TokenLoop
from mambakit.decoding.processor_sampler import ProcessorSampler
from mambakit.decoding.sampler import Chooser
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN

# Tokens between two checks for ended texts, each a device-to-host sync.
_TOKENS_PER_LOOK = {"cuda": 16, "cpu": 1}
_MOST_UNSEEN = 64  # without end tokens; a graph's history holds no more


def write_tokens(
    model: Any,
    cache: StateCache,
    text: Tensor,
    logits: Tensor,
    most: int,
    sampler: Chooser,
    cache_is_kept: bool,
    ends: Tensor | None = None,
    padding: int = 0,
) -> Tensor:
    """Decode until every text has had an end token, or for ``most`` tokens.

    With a `ProcessorSampler`, the tokens, the padding and the final state of the global random generator are those of
    transformers' loop.

    Args:
        cache: the states after ``text``.
        text: (b, l) int64, prompts.
        logits: (b, v) after the last token of ``text``.
        most: the maximum number of new tokens.
        sampler: of all b texts.
        cache_is_kept: leave ``cache`` in the state in which transformers' loop leaves it: every row has read all m
            tokens but the last, padding included. Otherwise ``cache`` must not be used afterwards, which is faster:
            slots of ended texts are dropped where that changes no bits and at least half have ended, and tokens read
            beyond the end are not undone.
        ends: (e,) int64, end-of-text tokens; None: nothing ends a text.
        padding: the token that follows a text's end.

    Returns:
        (b, m) int64, the new tokens, m <= ``most``.

    Raises:
        LogitsError: some logits are NaN, or a row has no distribution to draw from.
    """
    b = text.shape[0]
    pool = SlotPool(model, b, cache)
    shares = isinstance(sampler, ProcessorSampler)  # texts share the global generator
    draws = sampler.draws if isinstance(sampler, ProcessorSampler) else not sampler.plain
    first = sampler.sample(logits)
    if draws:
        _require_tokens(bool((first == NO_TOKEN).any()))
    loop = TokenLoop(pool, sampler, first.clamp(min=0), ends, padding)  # `NO_TOKEN` cannot be read
    # With `likeliest`, slots of ended texts read their own tokens where padding should be read.
    as_likeliest = ends is None or b == 1 or not cache_is_kept
    written = [first[:, None]]
    of: Tensor | None = None  # the text of each slot, after some were dropped
    count, going = 1, b if ends is None else b - int(loop.ended.sum())
    per_look = _MOST_UNSEEN if ends is None else _TOKENS_PER_LOOK[model.device.type]
    # Whether reading beyond the last end must be undone: it changes the state and the shared random numbers.
    shows = ends is not None and (cache_is_kept or (shares and draws))
    while count < most and going:
        tokens, going = _write_until_all_ended(loop, min(most - count, per_look), as_likeliest, draws, shows)
        count += tokens.shape[1]
        if of is not None:
            tokens = tokens.new_full((b, tokens.shape[1]), padding).index_copy_(0, of, tokens)
        written.append(tokens)
        if pool.elastic and not cache_is_kept and 0 < 2 * going <= pool.size:
            kept = (~loop.ended).nonzero()[:, 0]
            if pool.shrink(kept.tolist()):
                sampler.select(kept.tolist())
                of = kept if of is None else of[kept]
                loop.tokens, loop.ended = loop.tokens[kept], loop.ended[kept]
    pool.close()
    if not draws and not bool(are_numbers(logits, first).all() & pool.are_numbers(loop.tokens).all()):
        raise LogitsError(NO_CHOICE)
    return torch.cat(written, 1)


def _write_until_all_ended(
    loop: TokenLoop, count: int, as_likeliest: bool, draws: bool, shows: bool
) -> tuple[Tensor, int]:
    """Decode ``count`` tokens, or fewer where all texts end before.

    Args:
        draws: whether `NO_TOKEN` may be among the tokens.
        shows: whether tokens read beyond the last end must be undone.

    Returns:
        (tokens (size, m), number of texts that have not ended).
    """
    before = loop.tokens, loop.ended
    back = (loop.pool.snapshot(), loop.sampler.snapshot()) if shows and count > 1 else None
    tokens, ended = loop.write(count, as_likeliest=as_likeliest)
    over = ended.sum(0)  # (count,) number of texts that have ended at each token
    wrong = over.new_zeros(())
    if draws:
        wrong = ((tokens == NO_TOKEN) & ~torch.cat([before[1][:, None], ended[:, :-1]], 1)).sum()
    elif loop.ends is None:
        return tokens, len(tokens)
    *counts, wrongs = torch.cat([over, wrong[None]]).tolist()  # the device-to-host sync
    _require_tokens(wrongs > 0)
    used = counts.index(len(tokens)) + 1 if counts[-1] == len(tokens) else count
    if used < count:
        if back is not None:  # decode again from the snapshot, up to the last end
            loop.pool.go_back(back[0])
            loop.sampler.restore(back[1])
            loop.tokens, loop.ended = before
            loop.write(used, as_likeliest=as_likeliest)
        loop.tokens, loop.ended = tokens[:, used - 1].clamp(min=0), ended[:, used - 1]
    return tokens[:, :used], len(tokens) - counts[used - 1]


def _require_tokens(wrong: bool) -> None:
    if wrong:
        raise LogitsError(NO_CHOICE)
