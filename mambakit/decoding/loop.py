"""The loop over tokens: the slots of a pool read one token each, the next ones are chosen, and so on.

Everything that writes tokens comes here: `write_tokens` for `generate`, and the engine, streams and draft models of
`mambakit.generation`. A look is when tokens are brought to the host, which waits for the device. Between two looks several tokens may
be chosen (`TokenLoop.write`), or guesses may be verified (`TokenLoop.verify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.acceptance import Acceptance
from mambakit.decoding.drafting import Draft
from mambakit.decoding.logits import NO_CHOICE, are_numbers
from mambakit.decoding.processor_sampler import ProcessorSampler
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampler import Chooser, Sampler
from mambakit.decoding.slots import SlotPool
from mambakit.errors import LogitsError
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN


class TokenLoop:
    """The slots of a pool, what chooses their tokens, and the token that each reads next.

    Args:
        pool: the slots.
        sampler: chooses the next token of every slot.
        tokens: (size,) int64, chosen and not read yet.
        ends: (e,) int64: a text that has had one of these reads ``padding`` from then on. None: the host looks for ends.
        padding: a token.

    Attributes:
        ended: (size,) bool, which texts have had an end.
    """

    def __init__(self, pool: SlotPool, sampler: Chooser, tokens: Tensor, ends: Tensor | None = None, padding: int = 0):
        self.pool, self.sampler, self.tokens = pool, sampler, tokens
        self.ends, self.padding = ends, padding
        self.ended = self._are_ends(tokens)

    def write(self, count: int = 1, *, as_likeliest: bool = True) -> tuple[Tensor, Tensor]:
        """The next ``count`` tokens of each slot (size, count), and whether its text has ended by each (size, count) bool. The device is
        not waited for.

        Args:
            as_likeliest: where the sampler is plain, the decoder may choose by itself. Texts that have ended then read on in place of
                padding.
        """
        if as_likeliest and self.sampler.plain:
            tokens = self.pool.likeliest(self.tokens, count)
            ended = self._are_ends(tokens)
            if self.ends is not None:
                ended = ended.cummax(1).values | self.ended[:, None]
                before = torch.cat([self.ended[:, None], ended[:, :-1]], 1)
                tokens = tokens.masked_fill(before, self.padding)
            self.tokens, self.ended = tokens[:, -1].clamp(min=0), ended[:, -1]
            return tokens, ended
        found, endings = [], []
        for _ in range(count):
            token = self.sampler.sample(self.pool.step(self.tokens))
            if self.ends is not None:
                token = token.masked_fill(self.ended, self.padding)
                self.ended = self.ended | self._are_ends(token)
            self.tokens = token.clamp(min=0)  # `NO_TOKEN` cannot be read
            found.append(token)
            endings.append(self.ended)
        return torch.stack(found, 1), torch.stack(endings, 1)

    def read(self, tokens: Tensor) -> None:
        """Every slot reads its one of ``tokens`` (size,); what follows is not asked for."""
        self.pool.step(tokens)

    def _are_ends(self, tokens: Tensor) -> Tensor:
        if self.ends is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return tokens == self.ends if len(self.ends) == 1 else torch.isin(tokens, self.ends)


class SlotLoop:
    """Texts that come and go in the slots of a pool, each looked at by the host: admitted, written, verified, released.

    Args:
        pool: its slots hold the texts (``pool.held``), which have a `SampledText` as ``sampled``.
        guesses: the most of a draft.
    """

    def __init__(self, pool: SlotPool, guesses: int = 0):
        self.pool, self.sampler, self._guesses = pool, Sampler(), guesses
        self._device = pool.model.device
        self._loop = TokenLoop(pool, self.sampler, self._zeros(pool.size))
        self._next: dict[int, int] = {}  # tokens that slots are to read, which are not on the device yet
        self._seated = False  # whether the sampler knows the texts in the slots
        self._acceptances: dict[SampledText, Acceptance] = {}
        self._chosen: list[list[int]] = []  # by the last verification

    # -- slots -----------------------------------------------------------------------------------------------------

    def admit(self, text: Any, state: StateCache, token: int) -> None:
        """Give a free slot to a text that goes on from ``state``, which is copied, with ``token``, which it has not read.

        Raises:
            ValueError: a state of another model; the slot stays free.
        """
        if None not in self.pool.held:
            added = self.pool.grow()
            self._loop.tokens = torch.cat([self._loop.tokens, self._zeros(added)])
        slot = self.pool.held.index(None)
        self.pool.put(slot, state)
        self.seat(slot, text, token)

    def seat(self, slot: int, text: Any, token: int) -> None:
        """``slot``, whose state is there already, goes on with ``token``."""
        self.pool.held[slot], self._next[slot], self._seated = text, token, False

    def release(self, slot: int) -> None:
        """The slot is free."""
        text = self.pool.held[slot]
        self._acceptances.pop(text.sampled, None)
        self.pool.held[slot], self._seated = None, False

    def shrink(self) -> None:
        """Leave out free slots where most are free, and that changes nobody's bits."""
        kept = [slot for slot, text in enumerate(self.pool.held) if text is not None]
        self._tokens()
        if kept and self.pool.shrink(kept):
            at = torch.tensor(kept, dtype=torch.int64, device="cpu").to(self._device)
            self._loop.tokens, self._seated = self._loop.tokens[at], False

    # -- tokens ----------------------------------------------------------------------------------------------------

    def look(self, count: int = 1) -> list[list[int]]:
        """The next tokens of every slot, after which the device has been waited for once: ``count``, or one where a constraint must be told
        of each. `NO_TOKEN` stands where none can be chosen; it is a text's last. What a free slot has means nothing."""
        self._tokens()
        if not self._seated:
            self.sampler.seat([None if text is None else text.sampled for text in self.pool.held])
            self._seated = True
        plain = self.sampler.plain
        tokens, _ = self._loop.write(1 if self.sampler.must_look else count)
        if plain:  # numbers that are none stay so
            wrong = ~self.pool.are_numbers(tokens[:, -1])
            tokens[:, -1].masked_fill_(wrong, NO_TOKEN)
        found: list[list[int]] = tokens.tolist()
        if self.sampler.must_look:
            return [[token] for token in self.sampler.accept([token for (token,) in found])]
        return found

    def verify(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The next tokens of every slot, given a draft for each: the guesses that stay, and one more. `keep` must follow."""
        last = self._tokens()
        most = max(len(draft.tokens) for draft in drafts)
        rows = [draft.tokens + draft.tokens[-1:] * (most - len(draft.tokens)) for draft in drafts]
        rows = [row if len(row) == most else [0] * most for row in rows]
        guesses = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(drafts), most).to(self._device)
        logits = self.pool.verify(torch.cat([last[:, None], guesses], 1), 1 + self._guesses)
        self._chosen = []
        for text, draft, row in zip(self.pool.held, drafts, logits, strict=True):
            chosen = [] if text is None else self._acceptance(text).choose(row[: len(draft.tokens) + 1], draft)
            self._chosen.append(chosen)
        return self._chosen

    def keep(self, counts: Sequence[int]) -> None:
        """After `verify`: of each slot's last token and guesses, the first so many are read, at least one. The next token to be read is
        the one that was chosen then."""
        self.pool.commit(list(counts))
        for slot, (count, chosen) in enumerate(zip(counts, self._chosen, strict=True)):
            if chosen:
                self._next[slot] = chosen[count - 1]

    def first(self, text: Any, logits: Tensor) -> list[int]:
        """The first token of a text after its prompt's ``logits`` (1, v)."""
        return self._acceptance(text).choose(logits, Draft([]))

    def _acceptance(self, text: Any) -> Acceptance:
        sampled: SampledText = text.sampled
        if sampled not in self._acceptances:
            self._acceptances[sampled] = Acceptance(sampled, self._device)
        return self._acceptances[sampled]

    def _tokens(self) -> Tensor:
        """(size,) the tokens that are read next, on the device."""
        if self._next:
            slots = torch.tensor(list(self._next), dtype=torch.int64, device="cpu").to(self._device)
            tokens = torch.tensor(list(self._next.values()), dtype=torch.int64, device="cpu").to(self._device)
            self._loop.tokens = self._loop.tokens.index_copy(0, slots, tokens)
            self._next.clear()
        return self._loop.tokens

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self._device)


# Tokens between two looks at whether the texts have ended.
_TOKENS_PER_LOOK = {"cuda": 16, "cpu": 1}
_MOST_UNSEEN = 64  # where nothing ends a text; a graph keeps no more


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
    """(b, m) the tokens after ``text`` (b, l), m <= ``most``, until every text has had an end; what follows an end is padding.

    With a `ProcessorSampler`, tokens, padding and the global generator's state afterwards are those of transformers' loop.

    Args:
        cache: what has read ``text``.
        logits: (b, v) after it.
        sampler: has all b texts.
        cache_is_kept: leave in ``cache`` what transformers' loop leaves: every row has read all m tokens but the last, padding
            included. Otherwise ``cache`` is used up: slots whose texts have ended are left out where that changes nobody's bits and at
            most half go on, and a GPU need not take back what it has read too much.
        ends: (e,) int64, the tokens that end a text; None where nothing does.
        padding: what follows a text's end.

    Raises:
        LogitsError: logits that are no numbers.
    """
    b = text.shape[0]
    pool = SlotPool(model, b, cache)
    shares = isinstance(sampler, ProcessorSampler)  # the global generator
    draws = sampler.draws if isinstance(sampler, ProcessorSampler) else not sampler.plain
    first = sampler.sample(logits)
    if draws:
        _require_tokens(bool((first == NO_TOKEN).any()))
    loop = TokenLoop(pool, sampler, first, ends, padding)
    # Slots whose decoder chooses by itself read on after an end, where padding should be read.
    as_likeliest = ends is None or b == 1 or not cache_is_kept
    written = [first[:, None]]
    of: Tensor | None = None  # the texts that have a slot, once some were left out
    count, going = 1, b if ends is None else b - int(loop.ended.sum())
    per_look = _MOST_UNSEEN if ends is None else _TOKENS_PER_LOOK[model.device.type]
    # Whether reading on after the last end would show: in the state, or in random numbers that others share.
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
    """(tokens (size, m), texts that go on): ``count`` tokens, or fewer where all texts have ended before.

    Args:
        draws: `NO_TOKEN` may be among them.
        shows: go back where more was read than that.
    """
    before = loop.tokens, loop.ended
    back = (loop.pool.snapshot(), loop.sampler.snapshot()) if shows and count > 1 else None
    tokens, ended = loop.write(count, as_likeliest=as_likeliest)
    over = ended.sum(0)  # texts that have ended by each token
    wrong = over.new_zeros(())
    if draws:
        wrong = ((tokens == NO_TOKEN) & ~torch.cat([before[1][:, None], ended[:, :-1]], 1)).sum()
    elif loop.ends is None:
        return tokens, len(tokens)
    *counts, wrongs = torch.cat([over, wrong[None]]).tolist()  # the look
    _require_tokens(wrongs > 0)
    used = counts.index(len(tokens)) + 1 if counts[-1] == len(tokens) else count
    if used < count:
        if back is not None:  # from before, and no further
            loop.pool.go_back(back[0])
            loop.sampler.restore(back[1])
            loop.tokens, loop.ended = before
            loop.write(used, as_likeliest=as_likeliest)
        loop.tokens, loop.ended = tokens[:, used - 1].clamp(min=0), ended[:, used - 1]
    return tokens[:, :used], len(tokens) - counts[used - 1]


def _require_tokens(wrong: bool) -> None:
    if wrong:
        raise LogitsError(NO_CHOICE)
