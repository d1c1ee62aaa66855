"""Drafts from a smaller model of the same vocabulary, for the texts of several slots together.

A draft model's state is copied before each token that it reads and rolled back by restoring a copy: for a small model
that is cheaper than reading the text again. Slots are stepped together, so a draft of k guesses for every slot takes k
steps, and all guesses are made on the device, with one device-to-host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.acceptance import draw, row_probabilities
from mambakit.decoding.drafting import NO_DRAFT, Draft, Drafter, DrafterPerSlot, Scores, SlotDrafter
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import PROPOSE, SamplingParams
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.tables import Tables
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


class DraftSlots:
    """A `SlotDrafter` by a smaller model.

    Guesses are chosen with the sampling parameters of each text, and have random numbers of their own; penalties and
    biases apply as in the text itself, constraints do not.

    Args:
        model: a causal language model in eval mode.
        slots: how many texts are drafted together.
    """

    def __init__(self, model: Any, slots: int):
        self.model = model
        self._pool = SlotPool(model, slots, model.backbone.new_cache(slots))
        self._texts: list[_SlotText | None] = [None] * slots
        self._snapshots: StateCache | None = None  # snapshot j of slot i is its row j * slots + i
        self._tables: Tables | None = None
        self._before: list[Tensor | None] = []  # the tables without the guesses of the last draft

    def begin(self, slot: int, ids: Tensor, sampling: SamplingParams) -> None:
        device, state = self.model.device, self.model.backbone.new_cache(1)
        ids = ids.to(device)
        prefill_states(self.model, [ids[:-1]], state)
        self._pool.put(slot, state)
        params = SamplingParams(**{f.name: getattr(sampling, f.name) for f in fields(SamplingParams)})
        sampled = SampledText(params, self.model.config.vocab_size, device, ids)
        read = ids[:-1].tolist()
        self._texts[slot] = _SlotText(sampled, len(ids), read, len(read), len(ids))
        self._record(0, [slot])
        self._remake_tables()

    def release(self, slot: int) -> None:
        self._texts[slot] = None
        self._remake_tables()

    def close(self) -> None:
        """Give back what is kept with the model."""
        self._pool.close()

    @torch.no_grad()
    def propose(self, texts: Sequence[list[int] | None], most: Sequence[int]) -> list[Draft]:
        active = [
            (slot, own, text)
            for slot, (own, text) in enumerate(zip(self._texts, texts, strict=True))
            if own is not None and text is not None
        ]
        if not active:
            return [NO_DRAFT] * len(texts)
        behind = self._roll_back(active)
        limit = max(most[slot] for slot, _, _ in active)
        late = max(behind.values())
        # With several slots, those that read a token first have one guess less, which costs less than another step.
        steps = limit + late if len(active) == 1 or limit == 1 else max(limit, late)
        if limit == 0 and late == 0:
            return [NO_DRAFT] * len(texts)
        inputs = [[0] * len(texts) for _ in range(late + 1)]  # those that are known: the text's own last tokens
        for slot, own, text in active:
            for i, token in enumerate(text[len(own.read) :][: late + 1]):
                inputs[i][slot] = token
        known = torch.tensor(inputs, dtype=torch.int64, device="cpu").to(self.model.device, non_blocking=True)
        forced = torch.tensor(
            [[i <= behind.get(slot, late) for slot in range(len(texts))] for i in range(late + 1)],
            dtype=torch.bool,
            device="cpu",
        ).to(self.model.device, non_blocking=True)
        chosen: list[Tensor] = []
        kept: list[Tensor | None] = []
        tokens = known[0]
        for i in range(steps):
            if i:
                tokens = chosen[-1].clamp(min=0)  # `NO_TOKEN` cannot be read
                if i <= late:
                    tokens = torch.where(forced[i], known[i], tokens)
            logits = self._pool.step(tokens)
            self._record(i + 1)
            picked, q = self._choose(logits, active, behind, i)
            chosen.append(picked)
            kept.append(q)
        found: list[list[int]] = torch.stack(chosen, 1).tolist()  # the only device-to-host sync
        found = [row[behind.get(slot, 0) :] for slot, row in enumerate(found)]
        drafts = [NO_DRAFT] * len(texts)
        for slot, own, text in active:
            late = behind[slot]
            guesses = found[slot][: max(0, steps - late)]
            # The last guess is not read.
            own.read += [*text[len(own.read) :], *guesses[:-1]][:steps]
            if NO_TOKEN in guesses[: most[slot]]:
                raise LogitsError(NO_CHOICE)
            guesses = guesses[: most[slot]]
            q = None
            if guesses and not own.sampled.params.greedy:
                q = torch.stack([kept[late + i][slot] for i in range(len(guesses))])  # type: ignore[index]
            drafts[slot] = Draft(guesses, q)
        return drafts

    # -- states ----------------------------------------------------------------------------------------------------

    def _roll_back(self, active: Sequence[tuple[int, _SlotText, list[int]]]) -> dict[int, int]:
        """Bring every slot's state to a beginning of its text.

        Returns:
            By slot, the number of tokens that its state has not read, the last one not counted: 0 or 1.
        """
        assert self._snapshots is not None
        size = len(self._texts)
        rows, behind, far = list(range(size)), {}, []
        taking_part = {slot for slot, _, _ in active}
        for slot, own in enumerate(self._texts):
            if own is not None and slot not in taking_part:
                del own.read[own.base :]  # its later snapshots are overwritten
        for slot, own, text in active:
            known = _agreement(own.read, text, own.base)
            rows[slot] = (known - own.base) * size + slot
            del own.read[known:]
            own.base = known
            behind[slot] = len(text) - 1 - known
            if behind[slot] > 1:
                far.append((slot, own, text))
        self._pool.load_slots(self._snapshots, rows)
        for slot, own, text in far:  # its text was written without drafts for a while
            state = self._pool.copy_of(slot)
            more = text[len(own.read) : -1]
            ids = torch.tensor(more, dtype=torch.int64, device="cpu").to(self.model.device)
            prefill_states(self.model, [ids], state)
            self._pool.put(slot, state)
            own.read += more
            own.base, behind[slot] = len(own.read), 0
        self._record(0)
        self._follow(active)
        return behind

    def _record(self, j: int, slots: list[int] | None = None) -> None:
        """Copy the states of every slot, or of ``slots``, to their snapshots ``j``."""
        size, states = len(self._texts), self._pool.states
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

    def _follow(self, active: Sequence[tuple[int, _SlotText, list[int]]]) -> None:
        """Let the tables count what the texts have got since, and not the guesses of the last draft."""
        if self._tables is not None:
            self._tables.restore(self._before)
            new = {slot: text[own.counted :] for slot, own, text in active}
            for i in range(max(map(len, new.values()))):
                tokens = [new[s][i] if s in new and i < len(new[s]) else NO_TOKEN for s in range(len(self._texts))]
                self._count(torch.tensor(tokens, dtype=torch.int64, device="cpu").to(self.model.device))
            self._before = self._tables.snapshot()
        for _, own, text in active:
            own.counted = len(text)

    def _count(self, tokens: Tensor) -> None:
        assert self._tables is not None
        self._tables.count(tokens)

    def _choose(
        self, logits: Tensor, active: Sequence[tuple[int, _SlotText, list[int]]], behind: dict[int, int], i: int
    ) -> tuple[Tensor, Tensor | None]:
        """(the token of every slot (slots,) after step ``i``, the distributions (slots, v) they were drawn from)."""
        if self._tables is not None:
            logits = self._tables.change(logits)
        if all(own.sampled.params.greedy for _, own, _ in active):
            tokens, q = logits.argmax(-1), None
        else:
            uniform = np.zeros(len(logits))
            params: list[SamplingParams | None] = [None] * len(logits)
            for slot, own, text in active:
                params[slot] = own.sampled.params
                if (at := len(text) - own.prompt + i - behind[slot]) >= 0:
                    uniform[slot] = own.sampled.numbers(at, 1, PROPOSE)[0]
            q = row_probabilities(params, logits)
            tokens = draw(q, uniform)
        if self._tables is not None:
            # A slot that reads a token of its own text has counted it already.
            reading = [behind.get(slot, i + 1) > i for slot in range(len(logits))]
            counted = tokens
            if any(reading):
                counted = tokens.masked_fill(
                    torch.tensor(reading, dtype=torch.bool, device="cpu").to(tokens.device), NO_TOKEN
                )
            self._count(counted)
        return tokens, q


class DraftModel:
    """A `Drafter` by a smaller model of the same vocabulary. Several slots are drafted by `DraftSlots` of it.

    Args:
        model: a causal language model in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._slots: DraftSlots | None = None

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        if self._slots is not None:
            self._slots.close()
        self._slots = self.for_slots(1)
        self._slots.begin(0, ids, sampling)

    def propose(self, text: list[int], most: int) -> Draft:
        assert self._slots is not None
        return self._slots.propose([text], [most])[0]

    def for_slots(self, slots: int) -> DraftSlots:
        """A `SlotDrafter` by this model."""
        return DraftSlots(self.model, slots)

    def require_fit(self, model: Any) -> None:
        """
        Raises:
            ValueError: the draft model has another vocabulary than ``model``, or is on another device.
        """
        draft = self.model
        ours, theirs = model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; "
                "they must be the same"
            )
        if draft.device != model.device:
            raise ValueError(f"the draft model is on {draft.device} and the model on {model.device}; move one")


def slot_drafter(drafter: Drafter, model: Any, slots: int) -> SlotDrafter:
    """A drafter for ``slots`` texts of ``model``: a draft model drafts them together, any other drafter is copied for
    each text.

    Raises:
        TypeError: ``drafter`` has no `begin` and `propose`.
        ValueError: a draft model that does not fit ``model``.
    """
    if not (callable(getattr(drafter, "begin", None)) and callable(getattr(drafter, "propose", None))):
        raise TypeError(f"drafter is a {type(drafter).__name__}; give a DraftModel, a PromptLookup or another Drafter")
    if isinstance(drafter, DraftModel):
        drafter.require_fit(model)
        return drafter.for_slots(slots)
    return DrafterPerSlot(drafter, slots, model.device)


def _agreement(read: list[int], text: list[int], start: int) -> int:
    """The length of the common prefix of ``read`` and ``text[:-1]``, which is at least ``start``."""
    n = start
    while n < min(len(read), len(text) - 1) and read[n] == text[n]:
        n += 1
    return n
