"""Drafts from a smaller model of the same vocabulary, for the texts of several slots together.

A draft model's state is copied before each token that it reads and rolled back by restoring a copy: for a small model
that is cheaper than reading the text again. Slots are stepped together, so a draft of k guesses for every slot takes k
steps, and all guesses are made on the device, with one device-to-host sync. `mambakit.decoding.draft_rounds` makes the
same guesses without that sync.

**Late.** The last guess of a draft is not read. If it is accepted, the model reads it first in the next round, and the
text then has one guess less: with k guesses that are right with probability 0.7, 2 to 5 % of the tokens, where one more
step in every round is 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.acceptance import draw
from mambakit.decoding.distributions import row_probabilities
from mambakit.decoding.drafting import NO_DRAFT, Draft
from mambakit.decoding.guess_count import Guesses
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import PROPOSE, SamplingParams
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.tables import Tables
from mambakit.decoding.transfers import integers, to_device
from mambakit.errors import LogitsError
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import NO_TOKEN


@dataclass(eq=False)
class _SlotText:
    """What the draft model knows of a slot's text."""

    sampled: SampledText
    prompt: int
    """The number of tokens when it began."""
    read: list[int]
    """What the state has read, guesses included."""
    base: int
    """Snapshot i of the slot is the state after the first ``base + i`` tokens of ``read``."""
    counted: int
    """Tokens that the tables have counted for penalties."""
    missed: bool = False
    """Whether the model was not stepped in the last round."""


@dataclass(frozen=True)
class _Turn:
    """A slot's part in a draft."""

    own: _SlotText
    text: list[int]
    late: int
    """Tokens that it reads before its last one: 0 or 1."""
    count: int
    """Its guesses."""


class DraftSlots:
    """A `SlotDrafter` by a smaller model.

    Guesses are chosen with the sampling parameters of each text, and have random numbers of their own; penalties and
    biases apply as in the text itself, constraints do not.

    Args:
        model: a causal language model in eval mode.
        slots: how many texts are drafted together.

    Attributes:
        pool: the model's states.
    """

    def __init__(self, model: Any, slots: int):
        self.model = model
        self.pool = SlotPool(model, slots, model.backbone.new_cache(slots))
        self._texts: list[_SlotText | None] = [None] * slots
        self._snapshots: StateCache | None = None  # snapshot j of slot i is its row j * slots + i
        self._tables: Tables | None = None
        self._before: list[Tensor | None] = []  # the tables without the guesses of the last draft

    def begin(self, slot: int, ids: Tensor, sampling: SamplingParams, written: Sequence[int] = ()) -> None:
        device, state = self.model.device, self.model.backbone.new_cache(1)
        ids = to_device(device, ids)
        text = torch.cat([ids, integers(device, written)]) if written else ids
        prefill_states(self.model, [text[:-1]], state)
        self.pool.put(slot, state)
        params = SamplingParams(**{f.name: getattr(sampling, f.name) for f in fields(SamplingParams)})
        sampled = SampledText(params, self.model.config.vocab_size, device, ids)
        read = [*ids.tolist(), *written][:-1]
        self._texts[slot] = _SlotText(sampled, len(ids), read, len(read), len(ids))
        self._record(0, [slot])
        self._remake_tables()

    def release(self, slot: int) -> None:
        self._texts[slot] = None
        self._remake_tables()

    def close(self) -> None:
        """Give back what is kept with the model."""
        self.pool.close()

    @torch.no_grad()
    def propose(self, texts: Sequence[list[int] | None], guesses: Sequence[Guesses]) -> list[Draft]:
        drafts = [NO_DRAFT] * len(texts)
        if not any(one.most for one, text in zip(guesses, texts, strict=True) if text is not None):
            for own, text in zip(self._texts, texts, strict=True):
                if own is not None and text is not None:
                    own.missed = True
            return drafts
        late = self.align(texts)
        turns = {
            slot: _Turn(own, text, late[slot], max(0, min(guesses[slot].most, guesses[slot].steps - late[slot])))
            for slot, (own, text) in enumerate(zip(self._texts, texts, strict=True))
            if own is not None and text is not None
        }
        steps = max(guesses[slot].steps for slot in turns if guesses[slot].most)
        self._follow(turns)
        chosen: list[Tensor] = []
        kept: list[Tensor | None] = []
        known, forced = self._known(turns)
        tokens = known[0]
        for i in range(steps):
            if i:
                tokens = chosen[-1].clamp(min=0)  # `NO_TOKEN` cannot be read
                if i == 1 and forced is not None:
                    tokens = torch.where(forced, known[1], tokens)
            logits = self.pool.step(tokens)
            self._record(i + 1)
            picked, q = self._choose(logits, turns, i)
            chosen.append(picked)
            kept.append(q)
        found: list[list[int]] = torch.stack(chosen, 1).tolist()  # the only device-to-host sync
        for slot, turn in turns.items():
            made = found[slot][turn.late :]
            # The last guess is not read, and what is read beyond the text's own steps does not count.
            turn.own.read += [*turn.text[len(turn.own.read) :], *made[:-1]][: guesses[slot].steps]
            made = made[: turn.count]
            if NO_TOKEN in made:
                raise LogitsError(NO_CHOICE)
            q = None
            if made and not turn.own.sampled.params.greedy:
                q = torch.stack([kept[turn.late + i][slot] for i in range(len(made))])  # type: ignore[index]
            drafts[slot] = Draft(made, q)
        return drafts

    def _known(self, turns: dict[int, _Turn]) -> tuple[Tensor, Tensor | None]:
        """The tokens of the texts that are read first: (2, slots), and which slots read a second one."""
        first, second, forced = ([0] * len(self._texts) for _ in range(3))
        for slot, turn in turns.items():
            first[slot], second[slot], forced[slot] = turn.text[-1 - turn.late], turn.text[-1], turn.late
        known = integers(self.model.device, [first, second, forced])
        return known[:2], known[2] > 0 if any(forced) else None

    # -- states ----------------------------------------------------------------------------------------------------

    def align(self, texts: Sequence[list[int] | None]) -> list[int]:
        """Bring the state of every slot to a beginning of its text, without what it has read of wrong guesses.

        Args:
            texts: as in `propose`.

        Returns:
            By slot, the number of tokens that its state has not read, the last one not counted: 0 or 1.
        """
        assert self._snapshots is not None
        size = len(self._texts)
        rows, late, far = list(range(size)), [0] * size, []
        for slot, (own, text) in enumerate(zip(self._texts, texts, strict=True)):
            if own is None:
                continue
            if text is None:
                del own.read[own.base :]  # its later snapshots are overwritten
                continue
            known = _agreement(own.read, text, own.base)
            rows[slot] = (known - own.base) * size + slot
            del own.read[known:]
            own.base, late[slot] = known, len(text) - 1 - known
            # Its text was written without drafts for a while.
            if late[slot] > 1 or (own.missed and late[slot]):
                far.append((slot, own, text))
            own.missed = False
        self.pool.states.gather_(self._snapshots, integers(self.model.device, rows))
        self.pool.changed()
        if far:
            slots = [slot for slot, _, _ in far]
            states, more = self.pool.states.select(slots), [text[len(own.read) : -1] for _, own, text in far]
            prefill_states(self.model, [integers(self.model.device, ids) for ids in more], states)
            self.pool.load_slots(states, slots)
            for (slot, own, _), ids in zip(far, more, strict=True):
                own.read += ids
                own.base, late[slot] = len(own.read), 0
        self._record(0)
        return late

    def stepped(self, texts: Sequence[list[int] | None], late: Sequence[int], missed: bool) -> None:
        """Note what the states have read, after they were stepped without `propose`.

        Args:
            texts: as in `propose`; the state of slot i has read all of its text but the last ``1 + late[i]`` tokens.
            late: by slot, 0 or more.
            missed: whether the model was not stepped in the last round.
        """
        for own, text, behind in zip(self._texts, texts, late, strict=True):
            if own is not None and text is not None:
                own.read = text[: len(text) - 1 - behind]
                own.base, own.missed = len(own.read), missed
        self._record(0)

    def _record(self, j: int, slots: list[int] | None = None) -> None:
        """Copy the states of every slot, or of ``slots``, to their snapshots ``j``."""
        size, states = len(self._texts), self.pool.states
        if self._snapshots is None or self._snapshots.max_batch_size < (j + 1) * size:
            larger = states.empty_like(max(j + 1, 5) * size)
            if self._snapshots is not None:
                before = list(range(self._snapshots.max_batch_size))
                larger.copy_(self._snapshots, before, before)
            self._snapshots = larger
        every = list(range(size)) if slots is None else slots
        self._snapshots.copy_(states, every, [j * size + slot for slot in every])

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _remake_tables(self) -> None:
        texts = [None if own is None else own.sampled for own in self._texts]
        if self._tables is not None:
            self._tables.restore(self._before)
        changing = any(text is not None and text.changes_logits for text in texts)
        self._tables = Tables(texts, self.model.device) if changing else None
        self._before = [] if self._tables is None else self._tables.snapshot()

    def _follow(self, turns: dict[int, _Turn]) -> None:
        """Let the tables count what the texts have got since, and not the guesses of the last draft."""
        if self._tables is not None:
            self._tables.restore(self._before)
            new = {slot: turn.text[turn.own.counted :] for slot, turn in turns.items()}
            for i in range(max(map(len, new.values()))):
                tokens = [new[s][i] if s in new and i < len(new[s]) else NO_TOKEN for s in range(len(self._texts))]
                self._tables.count(integers(self.model.device, tokens))
            self._before = self._tables.snapshot()
        for turn in turns.values():
            turn.own.counted = len(turn.text)

    def _choose(self, logits: Tensor, turns: dict[int, _Turn], i: int) -> tuple[Tensor, Tensor | None]:
        """(the token of every slot (slots,) after step ``i``, the distributions (slots, v) they were drawn from)."""
        if self._tables is not None:
            logits = self._tables.change(logits)
        if all(turn.own.sampled.params.greedy for turn in turns.values()):
            tokens, q = logits.argmax(-1), None
        else:
            uniform = np.zeros(len(logits))
            params: list[SamplingParams | None] = [None] * len(logits)
            for slot, turn in turns.items():
                params[slot] = turn.own.sampled.params
                if (at := len(turn.text) - turn.own.prompt + i - turn.late) >= 0:
                    uniform[slot] = turn.own.sampled.numbers(at, 1, PROPOSE)[0]
            q = row_probabilities(params, logits)
            tokens = draw(q, uniform)
        if self._tables is not None:
            # A slot that reads a token of its own text has counted it already.
            reading = [i < turns[slot].late if slot in turns else True for slot in range(len(logits))]
            counted = tokens
            if any(reading):
                mask = to_device(tokens.device, torch.tensor(reading, dtype=torch.bool, device="cpu"))
                counted = tokens.masked_fill(mask, NO_TOKEN)
            self._tables.count(counted)
        return tokens, q


def _agreement(read: list[int], text: list[int], start: int) -> int:
    """The length of the common prefix of ``read`` and ``text[:-1]``, which is at least ``start``."""
    n = start
    while n < min(len(read), len(text) - 1) and read[n] == text[n]:
        n += 1
    return n
