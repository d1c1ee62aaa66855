"""The tokens of one `generate` call with a drafter: texts that start together and advance by their accepted guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.draft_model import draft_cost, slot_drafter
from mambakit.decoding.draft_rounds import WrittenText
from mambakit.decoding.drafting import Drafter
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.speculation import Speculation
from mambakit.errors import LogitsError
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN


@dataclass(frozen=True)
class Drafting:
    """How `generate` drafts.

    Args:
        drafter: a draft model drafts all texts together; any other drafter is copied for each text.
        draft_tokens: the maximum number of guesses per draft, 1 to 15.
    """

    drafter: Drafter
    draft_tokens: int


def write_drafted_tokens(
    model: Any,
    cache: StateCache,
    prompts: Sequence[Tensor],
    logits: Tensor,
    most: int,
    sampled: Sequence[SampledText],
    drafting: Drafting,
    cache_is_kept: bool,
    ends: Tensor | None = None,
    padding: int = 0,
) -> Tensor:
    """Decode until every text has had an end token, or for ``most`` tokens.

    Args:
        cache: the states after the prompts.
        prompts: of each text its tokens (l,), without padding.
        logits: (b, v) after the prompts.
        most: the maximum number of new tokens.
        sampled: how each text's tokens are chosen.
        cache_is_kept, ends, padding: as in `mambakit.decoding.batch.write_tokens`.

    Returns:
        (b, m) int64, the new tokens, m <= ``most``.

    Raises:
        LogitsError: some logits are NaN, or a row has no distribution to draw from.
    """
    b, columns = len(prompts), cache.get_seq_length()
    stops = frozenset() if ends is None else frozenset(ends.tolist())
    loop = SlotLoop(SlotPool(model, b, cache), drafting.draft_tokens)
    drafter = slot_drafter(drafting.drafter, model, b)
    speculation = Speculation(loop, drafter, b, drafting.draft_tokens, draft_cost(drafting.drafter, model))
    texts = []
    final: dict[int, StateCache] = {}  # by slot: a free slot's state may be stepped with the others'

    def end(slot: int) -> None:
        if cache_is_kept:
            final[slot] = loop.pool.copy_of(slot)
        loop.release(slot)
        speculation.release(slot)

    for slot, (one, ids) in enumerate(zip(sampled, prompts, strict=True)):
        text = _Text(one)
        texts.append(text)
        (token,) = loop.first(text, logits[slot : slot + 1])
        loop.seat(slot, text, token)
        if _take(text, [token], stops, most):
            end(slot)
        else:
            written = WrittenText(one, [*ids.tolist(), token], 1, most, stops)
            speculation.begin(slot, written, ids, drafting.draft_tokens)
    while any(text is not None for text in loop.pool.occupants):
        if (found := speculation.next()) is None:
            continue
        for slot, (one, tokens) in enumerate(zip(found.texts, found.tokens, strict=True)):
            if one is not None and _take(one, tokens, stops, most):
                end(slot)
    speculation.close()
    loop.pool.close()
    m = max(len(text.written) for text in texts)
    rows = [text.written + [padding] * (m - len(text.written)) for text in texts]
    new = torch.tensor(rows, dtype=torch.int64, device="cpu").to(logits.device)
    if cache_is_kept:
        for slot, state in final.items():
            cache.copy_(state, [0], [slot])
        # Every text's state has read all of its tokens but the last, as after transformers' loop.
        _read_padding(model, cache, new, [len(text.written) - 1 for text in texts], columns + m - 1)
    return new


@dataclass(eq=False)
class _Text:
    sampled: SampledText
    written: list[int] = field(default_factory=list)


def _take(text: _Text, tokens: list[int], stops: frozenset[int], most: int) -> bool:
    """Append ``tokens`` up to the text's end. Returns whether it has ended."""
    for token in tokens:
        if token == NO_TOKEN:
            raise text.sampled.exception or LogitsError(text.sampled.error or NO_CHOICE)
        text.written.append(token)
        if token in stops or len(text.written) == most:
            return True
    return False


def _read_padding(model: Any, cache: StateCache, tokens: Tensor, read: list[int], columns: int) -> None:
    """Every row's state reads all columns of ``tokens`` (b, m) but the last, as transformers' loop leaves it."""
    m = tokens.shape[1]
    if rows := [i for i, n in enumerate(read) if n < m - 1]:
        states = cache.select(rows)
        prefill_states(model, [tokens[i, read[i] : m - 1] for i in rows], states)
        cache.copy_(states, list(range(len(rows))), rows)
    cache.advance(columns - cache.get_seq_length())
