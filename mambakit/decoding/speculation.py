"""Speculation: texts of several slots, each of which gets the accepted guesses of a draft and one more token a round.

Two ways lead to the same tokens. With a draft model and texts that need no host between two tokens, a round runs on the
device, and the next one is launched before the tokens of the last one are handled (`mambakit.decoding.draft_rounds`).
Otherwise the host sees a draft, its verification and what was chosen, with one device-to-host sync after each; then all
slots of the round go that way. A text's number of guesses follows its own acceptance (`mambakit.decoding.guess_count`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mambakit.decoding.draft_rounds import DraftRounds, Launched, Result, WrittenText, needs_host
from mambakit.decoding.draft_slots import DraftSlots
from mambakit.decoding.drafting import NO_DRAFT, Draft, SlotDrafter
from mambakit.decoding.guess_count import NO_GUESSES, GuessCount, Guesses
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.loop import LogProbsBySlot, SlotLoop
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.transfers import integers
from mambakit.errors import LogitsError
from mambakit.ops.sampling.api import NO_TOKEN

_Verified: TypeAlias = "tuple[list[WrittenText | None], dict[WrittenText, Guesses], list[Draft], list[list[int]]]"


@dataclass(frozen=True)
class Written:
    """The tokens of a round.

    Args:
        texts: per slot, its occupant; None where the tokens are of none.
        tokens: per slot, up to the text's end.
        log_probs: by slot, of those tokens, where the text asks for them.
    """

    texts: list[Any]
    tokens: list[list[int]]
    log_probs: LogProbsBySlot


class Speculation:
    """Writes the texts of a loop's slots with drafts.

    Args:
        loop: the slots.
        drafter: of as many slots.
        slots: their number.
        guesses: the maximum number of guesses of a draft.
        step_cost: of the draft model's steps (`guess_count.step_cost`); 0: guesses are free.
        failed: called with a drafter's exception, after which texts are written without drafts. None: it is raised.
        may_cut: whether `settle` may be given fewer tokens than a text has got.

    Attributes:
        rounds: the number of verifications, each of which reads the weights once.
        proposed, accepted: the numbers of guesses that were verified, and that were accepted.
    """

    def __init__(
        self,
        loop: SlotLoop,
        drafter: SlotDrafter,
        slots: int,
        guesses: int,
        step_cost: float,
        failed: Callable[[Exception], None] | None = None,
        may_cut: bool = False,
    ):
        self._loop, self._pool, self._drafter, self._slots = loop, loop.pool, drafter, slots
        self._guesses, self._cost, self._tell = guesses, step_cost, failed
        self._failed, self._may_cut = False, may_cut
        self._texts: list[WrittenText | None] = [None] * slots
        self._drafted: set[WrittenText] = set()  # texts that the drafter has begun
        self._upcoming: dict[WrittenText, Guesses] = {}  # of the next round
        self._rounds: DraftRounds | None = None  # while the device knows more than loop and drafter
        self._unseated: set[int] = set()
        self._plain = False  # whether the last round on the device had no drafts
        self._launched: Launched | None = None
        self._verified: _Verified | None = None  # the host's round that is not settled yet
        self._last: tuple[Launched, Written] | None = None  # the round whose tokens were given last
        self.rounds = self.proposed = self.accepted = 0

    # -- texts -----------------------------------------------------------------------------------------------------

    def begin(self, slot: int, text: WrittenText, prompt: Tensor, guesses: int) -> None:
        """A text has a slot now, and the first of its tokens. One that has left its slot goes on as if it had not.

        Args:
            prompt: (l,) int64, its tokens without the new ones.
            guesses: the maximum number of guesses of its drafts.
        """
        self._texts[slot] = text
        self._unseated.add(slot)
        if guesses and not self._failed:
            new = text.known[len(text.known) - text.written : len(text.known) - text.late]
            self._drafter.begin(slot, prompt, text.sampled.params, new)
            self._drafted.add(text)
            text.count = text.count or GuessCount(min(guesses, self._guesses), self._cost)

    def release(self, slot: int) -> None:
        """The text has left its slot."""
        text, self._texts[slot] = self._texts[slot], None
        if text is not None:
            self._upcoming.pop(text, None)
            if text in self._drafted:
                self._drafted.remove(text)
                self._drafter.release(slot)
            if self._plain:  # it would have read what it has missed before it guesses again
                text.late = 0
        self._pool.ahead.discard(slot)

    @torch.no_grad()
    def close(self) -> None:
        """Nothing more is written: give back what is kept with a model. With ``may_cut`` the states are those after the
        tokens of the last round that was given."""
        if self._launched is not None and self._launched.start is not None:
            for slot in self._pool.ahead.copy():
                self._restart(slot, self._launched, 0, [])
        self._forget()
        self._drafter.close()

    @property
    def in_flight(self) -> bool:
        """Whether the device works on a round, so that states are ahead of the texts."""
        return self._launched is not None

    # -- rounds ----------------------------------------------------------------------------------------------------

    def next(self) -> Written | None:
        """`round` and `settle`."""
        found = self.round()
        if found is not None:
            self.settle()
        return found

    @torch.inference_mode(False)  # what is captured outlives the call
    @torch.no_grad()
    def round(self) -> Written | None:
        """The next tokens of every slot: one, and the guesses before it that were accepted; None where the first of
        several rounds was launched just now. Call `settle` next. The states are then those after all of the tokens but
        the last, or after a text's end, or ahead of that (`SlotPool.ahead`)."""
        if not self._is_on_device():
            return self._verify() if self._launched is None else self.wait()
        launched = self._launch()
        found = self._arrived(launched)
        self._launched = launched
        self._note_ahead()
        return found

    def wait(self) -> Written | None:
        """The tokens of the round that was launched, if one was; call `settle` next. Afterwards states are those after
        its tokens."""
        found = self._arrived(None)
        self._launched = None
        self._note_ahead()
        return found

    def _forget(self) -> None:
        self._launched = None
        self._pool.ahead.clear()

    def forget(self) -> None:
        """Drop the round that was launched: all texts have ended."""
        self._forget()

    def _verify(self) -> Written:
        """A round by the host."""
        self._leave_device()
        texts = self._going()
        guesses = self._ask()
        drafts = self._propose(texts, guesses)
        found = self._loop.verify(drafts)
        self._verified = texts, guesses, drafts, found
        self.rounds += 1
        self.proposed += sum(len(draft.tokens) for draft in drafts)
        self.accepted += sum(max(0, len(tokens) - 1) for tokens in found)
        occupants = [self._pool.occupants[slot] if text is not None else None for slot, text in enumerate(texts)]
        return Written(occupants, found, self._loop.log_probs)

    @torch.no_grad()
    def settle(self, counts: Sequence[int] | None = None) -> None:
        """After `round`: the state of slot i reads ``counts[i]`` of the last token before it and of its tokens; None:
        up to each text's end. A text that is cut has ended, for a reason of the caller's."""
        if self._verified is None:
            if counts is not None:
                self._cut(counts)
            return
        texts, guesses, drafts, found = self._verified
        self._verified, read = None, []
        drafted = any(one.most for one in guesses.values())
        for slot, (text, draft, tokens) in enumerate(zip(texts, drafts, found, strict=True)):
            if text is None:
                read.append(0)
                continue
            end = text.length_until_end(tokens) if counts is None else counts[slot]
            read.append(len(tokens) if end is None else end)
            self._note(text, len(draft.tokens), max(0, len(tokens) - 1), guesses[text].steps if drafted else None)
            text.take(tokens[: read[-1]])
        self._loop.keep(read)

    def _note(self, text: WrittenText, guesses: int, accepted: int, steps: int | None) -> None:
        """Note the results of a round in which the draft model has read ``steps`` tokens for a text; None: it was not
        stepped, and will read what it has missed before it guesses again."""
        text.late = 0 if steps is None else int(text.late + 1 + accepted > steps)
        if text.count is not None and text in self._drafted:
            text.count.note(guesses, accepted)

    def _cut(self, counts: Sequence[int]) -> None:
        """After a round on the device, which has read all of its tokens: return to its start, and read again."""
        assert self._last is not None
        launched, found = self._last
        for slot, (tokens, count) in enumerate(zip(found.tokens, counts, strict=True)):
            if count < len(tokens):
                text = launched.texts[slot]
                text.ended, self._launched = True, None
                read = text.known[len(text.known) - len(tokens) - 1 :][:count]
                self._restart(slot, launched, len(tokens), read)

    def _restart(self, slot: int, launched: Launched, read: int, tokens: list[int]) -> None:
        """Return to the state before a round that has read ``read`` tokens, and read ``tokens``."""
        assert launched.start is not None
        model, state = self._pool.model, launched.start.select([slot])
        state.advance(self._pool.seen(slot) - read - state.get_seq_length())
        if tokens:
            prefill_states(model, [integers(model.device, tokens)], state)
        self._pool.put(slot, state)

    # -- by the host -----------------------------------------------------------------------------------------------

    def _going(self) -> list[WrittenText | None]:
        texts = self._texts[: self._pool.size]
        return [None if text is None or text.ended else text for text in texts]

    def _ask(self) -> dict[WrittenText, Guesses]:
        """The guesses of the next round."""
        for text in self._going():
            if text is not None and text not in self._upcoming:
                guesses = NO_GUESSES
                if text.count is not None and text in self._drafted and not self._failed:
                    guesses = text.count.next()
                self._upcoming[text] = guesses
        asked, self._upcoming = self._upcoming, {}
        return asked

    def _propose(self, texts: list[WrittenText | None], guesses: dict[WrittenText, Guesses]) -> list[Draft]:
        if self._failed:
            return [NO_DRAFT] * len(texts)
        asked = [NO_GUESSES] * self._slots
        for slot, text in enumerate(texts):
            if text is not None:
                most, steps = guesses[text]
                asked[slot] = Guesses(max(0, min(most, text.most - text.written - 1)), steps)
        try:
            return self._drafter.propose(self._known(), asked)[: len(texts)]
        except torch.AcceleratorError:
            raise
        except Exception as error:  # a drafter may be a user's own
            self._fail(error)
            return [NO_DRAFT] * len(texts)

    def _fail(self, error: Exception) -> None:
        """Guesses change the speed, never the texts."""
        if self._tell is None:
            raise error
        self._tell(error)
        self._failed = True

    # -- on the device ---------------------------------------------------------------------------------------------

    def _is_on_device(self) -> bool:
        """Whether the next round runs on the device."""
        if self._failed or not isinstance(self._drafter, DraftSlots):
            return False
        texts = {slot: text for slot, text in enumerate(self._going()) if text is not None}
        return needs_host(self._pool, self._drafter, texts, self._guesses) is None

    def _launch(self) -> Launched | None:
        """The next round, or None where there is nothing to write, or where the tokens of the last one are needed."""
        assert isinstance(self._drafter, DraftSlots)
        texts = {slot: text for slot, text in enumerate(self._going()) if text is not None}
        before = {} if self._launched is None else self._launched.texts
        # A round gives one token at least.
        if all(text.written + (before.get(slot) is text) >= text.most for slot, text in texts.items()):
            return None
        asked = self._ask()
        drafted = any(one.most for one in asked.values())
        if self._rounds is None or (drafted and self._plain):
            if self._launched is not None:
                self._upcoming = asked
                return None
            self._enter_device(texts)
        assert self._rounds is not None
        self._rounds.seat({slot: texts[slot] for slot in sorted(self._unseated) if slot in texts})
        self._unseated.clear()
        self._plain = not drafted
        start = self._pool.states.clone() if self._may_cut else None
        return self._rounds.launch(texts, {slot: asked[text] for slot, text in texts.items()}, start)

    def _enter_device(self, texts: dict[int, WrittenText]) -> None:
        """Have the draft model read what it has not read, and the device know all texts."""
        assert isinstance(self._drafter, DraftSlots)
        if self._rounds is None:
            self._rounds = DraftRounds(self._pool, self._drafter, self._guesses)
        else:
            self._drafter.stepped(self._known(), [0 if t is None else t.late for t in self._texts], True)
        late = self._drafter.align(self._known()) if self._drafted else [0] * self._slots
        for slot, text in texts.items():
            text.late = late[slot]
        self._unseated |= set(texts)

    def _leave_device(self) -> None:
        """Have the loop and the draft model's records know what was written on the device."""
        if self._rounds is None:
            return
        assert self._launched is None
        assert isinstance(self._drafter, DraftSlots)
        self._drafter.stepped(self._known(), [0 if t is None else t.late for t in self._texts], self._plain)
        for slot, text in enumerate(self._going()):
            if text is not None:
                self._loop.read_next(slot, text.known[-1])
        self._rounds = None

    def _known(self) -> list[list[int] | None]:
        """The tokens of every slot whose text has drafts."""
        return [None if text is None or text.ended or text not in self._drafted else text.known for text in self._texts]

    def _arrived(self, following: Launched | None) -> Written | None:
        """The tokens of the round that was launched, if one was; ``following`` was launched after it."""
        launched = self._launched
        if launched is None:
            return None
        results = launched.wait()
        size = self._pool.size
        found = Written([None] * size, [[] for _ in range(size)], {})
        broken = False
        self.rounds += 1
        self._last = launched, found
        for slot, text in launched.texts.items():
            if self._texts[slot] is not text or text.ended:
                continue
            result = results[slot]
            self._take(slot, text, result, launched)
            found.texts[slot], found.tokens[slot] = self._pool.occupants[slot], result.tokens
            broken |= result.broken
        if broken:
            self._launched = following
            self._fail(LogitsError(NO_CHOICE))
        return found

    def _take(self, slot: int, text: WrittenText, result: Result, launched: Launched) -> None:
        text.take(result.tokens)
        text.sampled.position += len(result.tokens)
        self._pool.read_on(slot, len(result.tokens))
        if result.tokens and result.tokens[-1] == NO_TOKEN:
            text.sampled.accept(NO_TOKEN)
        missed = text.late + len(result.tokens)
        self._note(text, result.guesses, result.accepted, launched.guesses[slot].steps)
        if launched.plain:
            text.late = missed
        self.proposed += result.guesses
        self.accepted += result.accepted

    def _note_ahead(self) -> None:
        following = {} if self._launched is None else self._launched.texts
        self._pool.ahead = {slot for slot, text in following.items() if not text.ended and self._texts[slot] is text}
