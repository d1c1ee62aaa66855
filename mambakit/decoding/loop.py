"""The token loop: every slot of a pool reads one token, a sampler chooses the next ones, and so on.

All decoding runs through it: `mambakit.decoding.batch` for `generate`, `SlotLoop` for the engine, streams and draft
models of `mambakit.generation`. Bringing tokens to the host is a device-to-host sync (a "look"). Between two looks the
loop chooses several tokens (`TokenLoop.write`), or verifies a draft (`SlotLoop.verify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mambakit.decoding.acceptance import Acceptance, choose_together
from mambakit.decoding.drafting import Draft
from mambakit.decoding.guess_count import COUNTS
from mambakit.decoding.log_probs import Recorded, Recorder, TokenLogProb
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampler import Chooser, Sampler
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.transfers import Arrival, integers, to_host
from mambakit.modules import StateCache

LogProbsBySlot: TypeAlias = "dict[int, list[TokenLogProb]]"


class TokenLoop:
    """The slots of a pool, the sampler that chooses their tokens, and the token that each slot reads next.

    Args:
        pool: the slots.
        sampler: chooses the next token of every slot.
        tokens: (size,) int64, chosen but not read yet.
        ends: (e,) int64, end-of-text tokens: after one of them a slot reads ``padding``. None: the caller detects ends
            on the host.
        padding: the padding token.

    Attributes:
        ended: (size,) bool, which texts have ended.
    """

    def __init__(self, pool: SlotPool, sampler: Chooser, tokens: Tensor, ends: Tensor | None = None, padding: int = 0):
        self.pool, self.sampler, self.tokens = pool, sampler, tokens
        self.ends, self.padding = ends, padding
        self.ended = self._are_ends(tokens)

    def write(self, count: int = 1, *, as_likeliest: bool = True, check: bool = False) -> tuple[Tensor, Tensor]:
        """Choose the next ``count`` tokens of every slot, without a device-to-host sync.

        Args:
            as_likeliest: let the decoder itself choose tokens if the sampler is plain. Slots whose texts have ended
                then keep reading their own tokens instead of padding.
            check: have `NO_TOKEN` where a slot's logits are NaN also where the decoder chooses, as samplers have it.

        Returns:
            (size, count) int64 tokens, and (size, count) bool whether the text has ended at or before each.
        """
        if as_likeliest and self.sampler.plain:
            tokens = self.pool.likeliest(self.tokens, count, check)
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

    def _are_ends(self, tokens: Tensor) -> Tensor:
        if self.ends is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return tokens == self.ends if len(self.ends) == 1 else torch.isin(tokens, self.ends)


class HostCopy:
    """A copy of ``tokens`` (size, count) int64 on the host, made as soon as the device has them, and of the
    log-probabilities that were recorded with them.

    What is launched on the device afterwards does not delay it.
    """

    def __init__(self, tokens: Tensor, recorded: Recorded | None):
        self._tokens = to_host(tokens)
        self._recorded, self._values = recorded, None if recorded is None else to_host(recorded.values)
        self._arrival = Arrival(tokens.device)

    def wait(self) -> tuple[list[list[int]], LogProbsBySlot]:
        """The tokens of every slot, and log-probabilities of the slots that ask for them. Waits for the device."""
        self._arrival.wait()
        found: list[list[int]] = self._tokens.tolist()
        return found, {} if self._recorded is None else self._recorded.by_slot(found, self._values)


class SlotLoop:
    """The token loop for texts that start and end at different times. The host sees every token.

    Args:
        pool: its slots hold the texts (``pool.occupants``), whose attribute ``sampled`` is a `SampledText`.
        guesses: the maximum number of tokens of a draft.

    Attributes:
        log_probs: by slot, log-probabilities of the tokens of the last `look` or `verify`, where its text asks for
            them.
    """

    def __init__(self, pool: SlotPool, guesses: int = 0):
        self.pool, self.sampler = pool, Sampler()
        # Numbers of guesses for which what a verifier captures or compiles is made once.
        self._counts = [*(k for k in COUNTS if k < guesses), guesses]
        self._device = pool.model.device
        self._loop = TokenLoop(pool, self.sampler, self._zeros(pool.size))
        self._next: dict[int, int] = {}  # by slot: the token it reads next, not on the device yet
        self._seated = False  # whether the sampler has the texts of all slots
        self.log_probs: LogProbsBySlot = {}
        self._acceptances: dict[SampledText, Acceptance] = {}
        self._chosen: list[list[int]] = []  # by the last verification, per slot
        self._guessed = False  # whether the last verification had guesses

    def prepare(self) -> None:
        """Make what verifies drafts, for every number of guesses: compiled and captured in the middle of a text, each
        would hold up all texts by a second or more. There must be slots."""
        if self.pool.captured:
            for guesses in self._counts:
                self.pool.prepare_verifier(1 + guesses)

    # -- slots -----------------------------------------------------------------------------------------------------

    def admit(self, text: Any, state: StateCache, token: int) -> int:
        """Put a text into a free slot, growing the pool if there is none. Returns the slot.

        Args:
            text: becomes the slot's occupant.
            state: of one row; it is copied.
            token: the next token that the slot reads.

        Raises:
            ValueError: a state of another model; the slot stays free.
        """
        if None not in self.pool.occupants:
            added = self.pool.grow()
            self._loop.tokens = torch.cat([self._loop.tokens, self._zeros(added)])
        slot = self.pool.occupants.index(None)
        self.pool.put(slot, state)
        self.seat(slot, text, token)
        return slot

    def seat(self, slot: int, text: Any, token: int) -> None:
        """Put a text into ``slot``, whose state is there already; it reads ``token`` next."""
        self.pool.occupants[slot], self._next[slot], self._seated = text, token, False

    def release(self, slot: int) -> None:
        """Free the slot."""
        text = self.pool.occupants[slot]
        self._acceptances.pop(text.sampled, None)
        self._next.pop(slot, None)
        self.pool.occupants[slot], self._seated = None, False

    def shrink(self) -> None:
        """Drop free slots if most are free and if that changes no text's bits."""
        kept = [slot for slot, text in enumerate(self.pool.occupants) if text is not None]
        self._tokens()
        if kept and self.pool.shrink(kept):
            at = integers(self._device, kept)
            self._loop.tokens, self._seated = self._loop.tokens[at], False

    # -- tokens ----------------------------------------------------------------------------------------------------

    def look(self, count: int = 1) -> list[list[int]]:
        """The next tokens of every slot, on the host: ``count`` per slot, after one device-to-host sync.

        With a constraint it is one token per slot, since the constraint must see each token before the next. `NO_TOKEN`
        stands where no token can be chosen; the text then ends. The tokens of a free slot are meaningless.
        ``log_probs`` are those of these tokens.
        """
        constrained = self.must_look
        tokens, _ = self._loop.write(1 if constrained else count, check=True)
        recorded = self.sampler.take_log_probs()
        found: list[list[int]] = tokens.tolist()
        self.log_probs = {} if recorded is None else recorded.by_slot(found)
        if constrained:
            return [[token] for token in self.sampler.accept([token for (token,) in found])]
        return found

    def launch(self, count: int) -> HostCopy:
        """The tokens of ``look(count)``, without waiting for them. No text may have a constraint (`must_look`)."""
        assert not self.must_look, "a constraint must see each token before the next one is chosen"
        tokens, _ = self._loop.write(count, check=True)
        return HostCopy(tokens, self.sampler.take_log_probs())

    @property
    def must_look(self) -> bool:
        """Whether the text of a slot has a constraint, which must see each token before the next one is chosen."""
        self._tokens()
        if not self._seated:
            self.sampler.seat([None if text is None else text.sampled for text in self.pool.occupants])
            self._seated = True
        return self.sampler.must_look

    def verify(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Verify one draft per slot. Returns each slot's accepted guesses and one more token. Call `keep` next.

        Where no slot has a guess, it is a plain step. The texts must not be written by `look` before or afterwards.
        """
        most = max(len(draft.tokens) for draft in drafts)
        self._guessed = most > 0
        rows = [[self._next.get(slot, 0), *draft.tokens, *[0] * (most - len(draft.tokens))]
                for slot, draft in enumerate(drafts)]  # fmt: skip
        tokens = integers(self._device, rows)
        if self._guessed:
            logits = self.pool.verify(tokens, 1 + next((k for k in self._counts if k >= most), most))
        else:
            logits = self.pool.step(tokens[:, 0])[:, None]
        taken = [slot for slot, text in enumerate(self.pool.occupants) if text is not None]
        acceptances = [self._acceptance(self.pool.occupants[slot]) for slot in taken]
        given = logits if len(taken) == len(logits) else logits[integers(self._device, taken)]
        self._chosen = [[] for _ in drafts]
        for slot, chosen in zip(
            taken, choose_together(acceptances, given, [drafts[slot] for slot in taken]), strict=True
        ):
            self._chosen[slot] = chosen
        self._record(logits)
        return self._chosen

    def _record(self, logits: Tensor) -> None:
        """Log-probabilities of the chosen tokens, of the texts that ask for them, from ``logits`` (size, t, v)."""
        self.log_probs = {}
        for slot, (text, chosen) in enumerate(zip(self.pool.occupants, self._chosen, strict=True)):
            if text is not None and text.sampled.log_probs is not None:
                recorder = Recorder([text.sampled.log_probs])
                tokens = integers(self._device, chosen)
                for i in range(len(chosen)):
                    recorder.record(logits[slot, i : i + 1], tokens[i : i + 1])
                if (recorded := recorder.take()) is not None:
                    self.log_probs |= {slot: recorded.by_slot([chosen])[0]}

    def keep(self, counts: Sequence[int]) -> None:
        """After `verify`: slot i reads the first ``counts[i]`` >= 1 of its last token and guesses; 0 of a free slot.

        It reads next the token that `verify` chose after those.
        """
        if self._guessed:
            self.pool.commit(list(counts))
        for slot, (count, chosen) in enumerate(zip(counts, self._chosen, strict=True)):
            if chosen:
                self._next[slot] = chosen[count - 1]

    def read_next(self, slot: int, token: int) -> None:
        """The text of ``slot`` was written without the loop, and reads ``token`` next."""
        self._next[slot] = token

    def first(self, text: Any, logits: Tensor) -> list[int]:
        """The first token of a text, from the ``logits`` (1, v) after its prompt."""
        return self._acceptance(text).choose(logits, Draft([]))

    def _acceptance(self, text: Any) -> Acceptance:
        sampled: SampledText = text.sampled
        if sampled not in self._acceptances:
            self._acceptances[sampled] = Acceptance(sampled, self._device)
        return self._acceptances[sampled]

    def _tokens(self) -> Tensor:
        """(size,) the tokens that slots read next, on the device."""
        if self._next:
            slots, tokens = integers(self._device, [list(self._next), list(self._next.values())])
            self._loop.tokens = self._loop.tokens.index_copy(0, slots, tokens)
            self._next.clear()
        return self._loop.tokens

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self._device)
