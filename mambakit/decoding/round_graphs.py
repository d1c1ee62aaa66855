"""A round of speculation as one CUDA graph: guesses of a draft model, their verification, the choice of tokens, the
commit, and the draft model's roll-back. `mambakit.decoding.draft_rounds` replays it.

What differs between texts and rounds lies in tensors: each row's last token, position and end, its number of guesses,
its sampling parameters and random numbers. So the host launches a round without knowing what the last one has written.

A row's text ends on the device, too: at one of its end tokens, at its maximum length, or where no token can be chosen.
Its state is then the one after its end, and later rounds leave it as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import CapturedGraph
from mambakit.decoding.device_acceptance import Numbers, Proposed, choose
from mambakit.decoding.distributions import Filters, distributions
from mambakit.decoding.sampling_params import ACCEPT, BLOCK, DRAW, PROPOSE
from mambakit.decoding.verify import DeviceVerifier
from mambakit.modules import StateCache
from mambakit.ops.sampling.api import OFF, sample

BLOCKS = 4  # of random numbers that a row has on the device: that of its position, those around it
_WINDOW = BLOCKS * BLOCK
# Columns of `RoundGraphs.rows`, before those of end tokens. PREVIOUS is the token before the last one, which the draft
# model reads first where LATE is 1. POSITION: the number of tokens chosen so far. MOST: where the text ends.
LAST, PREVIOUS, LATE, POSITION, MOST, ENDED, FIELDS = range(7)
# Columns of `RoundGraphs.found`, before those of the tokens: how many of them the text gets, the guesses and those that
# were accepted, and whether the draft model had no distribution to draw a guess from.
READ, GUESSED, ACCEPTED, BROKEN, TOKENS = range(5)


class Shape(NamedTuple):
    """What a graph is captured for."""

    guesses: int
    """The maximum of all rows; 0: a plain step."""
    steps: int
    """Of the draft model."""
    filters: Filters


class RoundGraphs:
    """The graphs of rounds over the states of two models, and the tensors that they read and write.

    It must not refer to a model, since it is kept with one (`of`).

    Args:
        states: of the b texts.
        draft: the draft model's captured decoder, of b rows.
        most: the maximum number of guesses.
        ends: the maximum number of end tokens of a text.
        vocabulary: v.

    Attributes:
        rows: (b, FIELDS + ends) int64: what is known of each row's text, and its end tokens, filled up with -1.
        asked: (b, 3) int64: a row's maximum number of guesses, the draft model's steps for it, and whether its text
            is written.
        columns: (b, 6) float64, each row's sampling parameters.
        numbers: (3, b, 256) float64, random numbers: of DRAW, ACCEPT and PROPOSE, each at its position modulo 256.
        found: (b, TOKENS + most + 1) int64, the result of the last round.
    """

    def __init__(self, states: StateCache, draft: Any, most: int, ends: int, vocabulary: int):
        b, device = states.max_batch_size, states.device
        self.draft, self.most, self.ends = draft, most, ends
        self.rows = torch.zeros(b, FIELDS + ends, dtype=torch.int64, device=device)
        self.asked = torch.zeros(b, 3, dtype=torch.int64, device=device)
        self.columns = torch.zeros(b, 6, dtype=torch.float64, device=device)
        self.numbers = torch.zeros(3, b, _WINDOW, dtype=torch.float64, device=device)
        self.found = torch.zeros(b, TOKENS + most + 1, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary
        self._snapshots = draft.states.empty_like((most + 1) * b)
        self._steps: Tensor | None = None  # (most + 1, b, v) float64, a draft's distributions
        self._graphs: dict[Shape, tuple[DeviceVerifier, CapturedGraph[None]]] = {}

    def take_over(self, other: RoundGraphs) -> None:
        """Continue the texts of ``other``, which has room for fewer end tokens."""
        columns = other.rows.shape[1]
        self.rows[:, :columns] = other.rows
        self.rows[:, columns:] = -1
        self.columns.copy_(other.columns)
        self.numbers.copy_(other.numbers)

    def launch(self, model: Any, small: Any, verifier: DeviceVerifier, shape: Shape) -> None:
        """A round, which nobody waits for.

        Args:
            model, small: of the texts and of the drafts.
            verifier: of ``shape.guesses + 1`` tokens, over the states.
        """
        verifier.hold()
        made = self._graphs.get(shape)
        if made is None or made[0] is not verifier:
            made = self._graphs[shape] = verifier, self._captured(model, small, verifier, shape)
        made[1].replay()

    def _captured(self, model: Any, small: Any, verifier: DeviceVerifier, shape: Shape) -> CapturedGraph[None]:
        if shape.filters.draws and self._steps is None:
            size = (self.most + 1, len(self.rows), self._vocabulary)
            self._steps = torch.zeros(size, dtype=torch.float64, device=self.rows.device)
        asked, states = self.asked.clone(), self.draft.states.clone()
        self.asked.zero_()  # the warm-up writes no text
        shared = next((graph for _, graph in self._graphs.values()), None)
        graph: CapturedGraph[None] = CapturedGraph(
            lambda: self._round(model, small, verifier, shape), self.rows.device, warm_ups=1, shared=shared
        )
        self.asked.copy_(asked)
        self.draft.states.load_(states)
        return graph

    def _round(self, model: Any, small: Any, verifier: DeviceVerifier, shape: Shape) -> None:
        k = shape.guesses
        last, previous, late, position, most, ended = self.rows[:, :FIELDS].unbind(1)
        _, steps, wanted = self.asked.unbind(1)
        going = (wanted > 0) & (ended == 0)
        proposed, broken = self._propose(small, shape)
        verifier.tokens[:, 0].copy_(last)
        if k:
            verifier.tokens[:, 1:].copy_(proposed.tokens)
        numbers = Numbers(self._numbers(DRAW, k + 1), self._numbers(ACCEPT, k + 1)) if shape.filters.draws else None
        logits = verifier.launch(model)
        tokens, accepted = choose(logits, proposed, self.columns, shape.filters, numbers)
        # What the text gets of them, up to its end.
        places = torch.arange(k + 1, dtype=torch.int64, device=tokens.device)
        is_end = (tokens < 0) | (tokens[:, :, None] == self.rows[:, None, FIELDS:]).any(-1)
        is_end |= position[:, None] + places + 1 >= most[:, None]
        is_end &= places <= accepted[:, None]
        before = (is_end.long().cumsum(1) == 0).long().sum(1)  # the first end
        read = torch.minimum(before, accepted) + 1
        read = torch.where(going, read, 0)
        verifier.kept.copy_(read)
        verifier.advance()
        self.found[:, READ], self.found[:, GUESSED], self.found[:, ACCEPTED] = read, proposed.counts, accepted
        self.found[:, BROKEN] = broken
        self.found[:, TOKENS : TOKENS + k + 1] = tokens
        need = late + 1 + accepted  # steps after which the draft model has read all but the new token
        if shape.steps:
            behind = (need > steps).long()
            rows = torch.arange(len(tokens), dtype=torch.int64, device=tokens.device)
            at = (need - behind).clamp(1, shape.steps) - 1
            self.draft.states.gather_(self._snapshots, at * len(tokens) + rows)
            late.copy_(torch.where(going, behind, late))
            before_last = tokens.gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]
            previous.copy_(torch.where(going, before_last.clamp(min=0), previous))
        newest = tokens.gather(1, (read - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
        last.copy_(torch.where(going, newest, last))
        position.add_(read)
        ended.add_(going & (before <= accepted))

    def _propose(self, small: Any, shape: Shape) -> tuple[Proposed, Tensor]:
        """(the guesses, (b,) whether a row's guesses could not be drawn)."""
        last, previous, late, position, most, _ = self.rows[:, :FIELDS].unbind(1)
        limit, steps, _ = self.asked.unbind(1)
        b, k, draft = len(last), shape.guesses, self.draft
        counts = torch.minimum(torch.minimum(limit, steps - late), most - position - 1).clamp(min=0)
        broken = torch.zeros_like(last)
        if not k:
            none = last.new_zeros(b, 0)
            return Proposed(none, torch.zeros_like(last), None, late), broken
        every = list(range(b))
        picks: list[Tensor] = []
        is_late = late > 0
        for i in range(shape.steps):
            if i == 0:
                draft.tokens.copy_(torch.where(is_late, previous, last))
            elif i == 1:
                draft.tokens.copy_(torch.where(is_late, last, picks[0]))
            elif shape.filters.draws:
                draft.tokens.copy_(picks[-1])
            draft.launch(small)
            if shape.filters.draws:
                assert self._steps is not None
                q = distributions(draft.logits, self.columns, shape.filters)
                self._steps[i] = q
                off = torch.stack([torch.full_like(q[:, 0], value, dtype=torch.float32) for value in OFF], 1)
                at = ((position + i - late) % _WINDOW)[:, None]
                picked = sample(q.log(), self.numbers[PROPOSE].gather(1, at)[:, 0], off)
                broken |= (picked < 0) & (late <= i) & (i < late + counts)
                picks.append(picked.clamp(min=0))
            else:
                picks.append(draft.tokens.clone())  # the decoder has chosen it
            self._snapshots.copy_(draft.states, every, [i * b + row for row in every])
        at = torch.arange(k, dtype=torch.int64, device=last.device) + late[:, None]
        tokens = torch.stack(picks, 1).gather(1, at.clamp(max=shape.steps - 1))
        return Proposed(tokens, counts, self._steps if shape.filters.draws else None, late.clone()), broken

    def _numbers(self, sequence: int, count: int) -> Tensor:
        """(b, count) float64, those of each row's next tokens."""
        at = self.rows[:, POSITION, None] + torch.arange(count, dtype=torch.int64, device=self.rows.device)
        return self.numbers[sequence].gather(1, at % _WINDOW)


def graphs_of(decoder: Any, small: Any, draft: Any, most: int, ends: int, vocabulary: int) -> RoundGraphs:
    """The graphs of two models' rounds, kept with the decoder of the texts as long as the draft model is there.

    Args:
        decoder, draft: the captured decoders of the texts and of the drafts.
        small: the draft model.
        most, ends, vocabulary: as in `RoundGraphs`; graphs for more serve, too.
    """
    kept: weakref.WeakKeyDictionary[Any, RoundGraphs] = decoder.rounds
    found = kept.get(small)
    if found is None or found.draft is not draft or found.most < most or found.ends < ends:
        with torch.inference_mode(False), torch.no_grad():
            found = kept[small] = RoundGraphs(decoder.states, draft, most, max(ends, 4), vocabulary)
    return found


def padded(values: Sequence[int], count: int) -> list[int]:
    """``values``, filled up with -1."""
    return [*values, *[-1] * (count - len(values))]
