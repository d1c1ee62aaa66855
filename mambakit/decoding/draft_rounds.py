"""Rounds of speculation on the device: the host replays graphs, and gets tokens by copies that nothing waits for.

Texts whose tokens depend on their logits and random numbers alone can be written so (`needs_host`). The host gives each
round the numbers of guesses and, from time to time, more random numbers; it launches the next round before it has the
tokens of the last one (`mambakit.decoding.speculation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.distributions import GREEDY, Filters
from mambakit.decoding.draft_slots import DraftSlots
from mambakit.decoding.guess_count import GuessCount, Guesses
from mambakit.decoding.round_graphs import BLOCKS, RoundGraphs, Shape, graphs_of, padded
from mambakit.decoding.round_steps import ACCEPTED, BROKEN, GUESSED, READ, TOKENS
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import BLOCK
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.transfers import Arrival, integers, to_device, to_host
from mambakit.modules import StateCache


@dataclass(eq=False)
class WrittenText:
    """A text that is written with drafts.

    Args:
        known: all tokens so far.
        written: those of them that are new.
        most: the maximum number of new tokens.
        ends: tokens that end it.
    """

    sampled: SampledText
    known: list[int]
    written: int
    most: int
    ends: frozenset[int]
    late: int = 0
    """Tokens that the draft model has not read, the last one not counted."""
    ended: bool = False
    count: GuessCount | None = None
    """How many guesses its drafts have; it stays with a text that leaves its slot for a while."""

    def take(self, tokens: Sequence[int]) -> None:
        """It has got these tokens, none of them after its end."""
        self.known += tokens
        self.written += len(tokens)
        if self.length_until_end(tokens, self.written - len(tokens)) is not None:
            self.ended = True

    def length_until_end(self, tokens: Sequence[int], written: int | None = None) -> int | None:
        """How many of ``tokens``, which follow the first ``written`` new ones (None: all), it takes to its end; None if
        it goes on."""
        before = self.written if written is None else written
        for i, token in enumerate(tokens):
            if not 0 <= token < self.sampled.vocab_size or token in self.ends or before + i + 1 >= self.most:
                return i + 1
        return None


@dataclass(frozen=True)
class Result:
    """What a round gave a text."""

    tokens: list[int]
    """None after its end."""
    guesses: int
    accepted: int
    broken: bool
    """Whether the draft model had no distribution to draw a guess from."""


class Launched:
    """A round that the device works on.

    Args:
        texts: by slot.
        guesses: of each of them.
        start: the states before it, where somebody wants them.
        found: `RoundGraphs.found`.

    Attributes:
        plain: whether the draft model is not stepped.
    """

    def __init__(
        self, texts: dict[int, WrittenText], guesses: dict[int, Guesses], start: StateCache | None, found: Tensor
    ):
        self.texts, self.guesses, self.start = texts, guesses, start
        self.plain = not any(one.most for one in guesses.values())
        # The next round overwrites it; a copy to the host is made before.
        self._found = to_host(found) if found.is_cuda else found.clone()
        self._arrival = Arrival(found.device)

    def wait(self) -> dict[int, Result]:
        """By slot; waits for the device."""
        self._arrival.wait()
        rows: list[list[int]] = self._found.tolist()
        return {
            slot: Result(
                rows[slot][TOKENS : TOKENS + rows[slot][READ]], rows[slot][GUESSED], rows[slot][ACCEPTED],
                bool(rows[slot][BROKEN]),
            )
            for slot in self.texts
        }  # fmt: skip


def needs_host(pool: SlotPool, draft: DraftSlots, texts: Mapping[int, WrittenText], most: int) -> str | None:
    """Why these texts are not written by rounds of up to ``most`` guesses on the device, or None where they are."""
    for text in texts.values():
        if text.sampled.changes_logits:
            return "a text has penalties, biases, a constraint or a least length"
        if text.sampled.log_probs is not None:
            return "a text asks for log-probabilities"
    if pool.graph is None or draft.pool.graph is None:
        return "a model's decoder is not a CUDA graph"
    return None if pool.verifies_on_device(most + 1) else "no CUDA graph can hold the verification"


class DraftRounds:
    """Launches rounds over the slots of a pool.

    Args:
        pool: the texts' states.
        draft: the draft model's, of as many slots.
        most: the maximum number of guesses.
    """

    def __init__(self, pool: SlotPool, draft: DraftSlots, most: int):
        assert pool.size == draft.pool.size
        self._pool, self._draft, self._most = pool, draft, most
        self._device = pool.model.device
        self._asked: list[list[int]] = []
        self._blocks: dict[WrittenText, int] = {}  # of random numbers: the next one that the device does not have
        self._graphs = self._graphs_for(4)
        self._graphs.asked.zero_()

    def seat(self, texts: Mapping[int, WrittenText]) -> None:
        """Give the device what is known of these texts, by slot."""
        if not texts:
            return
        ends = max(len(text.ends) for text in texts.values())
        if ends > self._graphs.ends:
            before, self._graphs = self._graphs, self._graphs_for(ends)
            self._graphs.take_over(before)
            self._asked = []
        graphs, slots = self._graphs, integers(self._device, list(texts))
        rows = [
            [text.known[-1], text.known[-1 - min(1, text.late)], min(1, text.late), text.sampled.position,
             text.sampled.position + text.most - text.written, 0, *padded(sorted(text.ends), graphs.ends)]
            for text in texts.values()
        ]  # fmt: skip
        graphs.rows.index_copy_(0, slots, integers(self._device, rows))
        columns = [GREEDY if text.sampled.params.greedy else text.sampled.params.columns for text in texts.values()]
        values = torch.tensor(columns, dtype=torch.float64, device="cpu")
        graphs.columns.index_copy_(0, slots, to_device(self._device, values))
        for text in texts.values():
            self._blocks[text] = text.sampled.position // BLOCK

    def launch(
        self, texts: dict[int, WrittenText], guesses: dict[int, Guesses], start: StateCache | None = None
    ) -> Launched:
        """A round of these texts, which were seated, without waiting for it. The arguments are those of `Launched`."""
        most = max(guesses[slot].most for slot in texts)
        steps = max((one.steps for one in guesses.values() if one.most), default=0)
        filters = Filters.of(text.sampled.params for text in texts.values()).rounded()
        verifier = self._pool.device_verifier(most + 1)
        self._ask(texts, guesses)
        self._send_numbers(texts)
        self._graphs.launch(self._pool.model, self._draft.model, verifier, Shape(most, steps, filters))
        return Launched(texts, guesses, start, self._graphs.found)

    def _graphs_for(self, ends: int) -> RoundGraphs:
        graph, draft = self._pool.graph, self._draft
        return graphs_of(graph, draft.model, draft.pool.graph, self._most, ends, self._pool.model.config.vocab_size)

    def _ask(self, texts: Mapping[int, WrittenText], guesses: Mapping[int, Guesses]) -> None:
        asked = [
            [guesses[slot].most, guesses[slot].steps, 1] if slot in texts else [0, 2, 0]
            for slot in range(self._pool.size)
        ]
        if asked != self._asked:
            self._graphs.asked.copy_(integers(self._device, asked))
            self._asked = asked

    def _send_numbers(self, texts: Mapping[int, WrittenText]) -> None:
        """The random numbers that this round may need, and of the next ones up to a block more."""
        self._blocks = {text: block for text, block in self._blocks.items() if not text.ended}
        for slot, text in texts.items():
            if text.sampled.params.greedy:
                continue
            # The device is at most one round ahead of ``position``: it needs that block and the next.
            last = text.sampled.position // BLOCK + 1
            for block in range(self._blocks[text], last + 1):
                numbers = np.stack([text.sampled.numbers(block * BLOCK, BLOCK, sequence) for sequence in range(3)])
                at = block % BLOCKS * BLOCK
                self._graphs.numbers[:, slot, at : at + BLOCK] = to_device(self._device, torch.from_numpy(numbers))
            self._blocks[text] = last + 1
