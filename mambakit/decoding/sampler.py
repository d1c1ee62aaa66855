"""The sampler: the next token of many texts at once, each with its own parameters, random numbers and constraint.

It takes a few launches for all slots: constraint masks, biases and penalties where a text has them, then one launch of
`mambakit.ops.sampling`. Random numbers for many tokens are on the device in advance, so that the next step needs no
host. Only a constraint must see each token on the host before the next one is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.log_probs import Recorded, Recorder
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import BLOCK
from mambakit.decoding.tables import Tables
from mambakit.decoding.transfers import integers, to_device
from mambakit.ops.sampling.api import NO_TOKEN, OFF, sample

_FREE = (0.0, *OFF[1:])  # parameters of a free slot: greedy, the cheapest


class Chooser(Protocol):
    """The interface of samplers: `Sampler`, and `ProcessorSampler` for transformers' random numbers."""

    @property
    def plain(self) -> bool:
        """Whether each token is the argmax of the unchanged logits. The decoder may then choose it."""

    def sample(self, logits: Tensor) -> Tensor:
        """The next token of every slot, without a device-to-host sync.

        Args:
            logits: (size, v), not modified.

        Returns:
            (size,) int64; may be `NO_TOKEN` where a slot's logits are NaN.
        """

    def select(self, kept: list[int]) -> None:
        """Slot i becomes the former slot ``kept[i]``."""

    def snapshot(self) -> Any:
        """What `restore` needs."""

    def restore(self, snapshot: Any) -> None:
        """Return to the snapshot: the tokens chosen since then are chosen again."""


class Sampler:
    """A `Chooser` whose texts may be exchanged at any time, each with its own `SamplingParams`.

    A text's token depends on its logits, parameters, seed and position; not on its slot, nor on the other texts.

    Args:
        texts: as in `seat`.
    """

    def __init__(self, texts: Sequence[SampledText | None] = ()):
        self._texts: list[SampledText | None] = []
        self._changed: list[int] | None = None  # slots whose parameters below are out of date; None: all
        self._column = 0  # of `_uniform`: that of the next random numbers
        self._noted: list[int] = []  # per slot: the column that belongs to its text's ``position``
        self._draws = False
        self._parameters = self._uniform = torch.empty(0, dtype=torch.float32, device="cpu")
        self._tables: Tables | None = None
        self._constrained: list[tuple[int, SampledText]] = []
        self._recorder = Recorder()
        self.plain = True
        self.seat(texts)

    @property
    def must_look(self) -> bool:
        """Whether the host must `accept` each token before the next is chosen: there is a constraint."""
        return bool(self._constrained)

    def seat(self, texts: Sequence[SampledText | None]) -> None:
        """Assign ``texts[i]`` to slot i; None: the slot is free."""
        before, self._texts = self._texts, list(texts)
        if len(before) == len(texts):
            changed = [i for i, text in enumerate(texts) if text is not before[i]]
            if not changed:
                return
            if self._changed is not None:
                self._changed += changed
        else:
            changed, self._changed = list(range(len(texts))), None
        self._note_positions(before)
        self._noted = [self._column] * len(texts)
        seated = [text for text in texts if text is not None]
        # A decoder that chooses tokens itself shows no logits to record.
        self.plain = all(text.plain and text.log_probs is None for text in seated)
        self._recorder = Recorder([None if text is None else text.log_probs for text in texts])
        self._draws = any(not text.params.greedy for text in seated)
        self._constrained = [(i, text) for i, text in enumerate(texts) if text is not None and text.matcher is not None]

    def select(self, kept: list[int]) -> None:
        self.seat([self._texts[i] for i in kept])

    @torch.no_grad()
    def sample(self, logits: Tensor) -> Tensor:
        if self._changed is None or self._changed:
            self._update(logits.device)
        if self._draws and self._column == BLOCK:
            self._next_block(logits.device)
        changed = logits if self._tables is None else self._tables.change(logits)
        tokens = sample(changed, self._uniform[:, self._column % BLOCK], self._parameters)
        self._column += self._draws
        if self._tables is not None:
            self._tables.count(tokens)
        self._recorder.record(logits, tokens)
        return tokens

    def take_log_probs(self) -> Recorded | None:
        """Log-probabilities of the tokens that were chosen since the last call, of the texts that ask for them."""
        return self._recorder.take()

    def accept(self, tokens: list[int]) -> list[int]:
        """The host's part of a step: pass the tokens (size) that `sample` chose to their constraints.

        Returns:
            The tokens, `NO_TOKEN` where none can be chosen. The `SampledText.error` of that text says why; other texts
            are unaffected.
        """
        for slot, constrained in self._constrained:
            tokens[slot] = constrained.accept(tokens[slot])
        if NO_TOKEN in tokens:
            for text, token in zip(self._texts, tokens, strict=True):
                if token == NO_TOKEN and text is not None:
                    text.error = text.error or NO_CHOICE
        return tokens

    def start(self, logits: Tensor, texts: Sequence[SampledText]) -> Tensor:
        """`seat` and `sample`: the next tokens (m,) of ``texts``, from logits (m, v), one row per text. `finish` is to
        be given them once they are on the host."""
        self.seat(texts)
        for text in texts:
            text.error, text.exception = "", None
        return self.sample(logits)

    def finish(self, tokens: list[int]) -> list[int]:
        """`accept`; the texts' positions are then those after the tokens."""
        tokens = self.accept(tokens)
        self._note_positions()
        return tokens

    def choose(self, logits: Tensor, texts: Sequence[SampledText]) -> list[int]:
        """`start` and `finish` in one call, with a device-to-host sync."""
        return self.finish(self.start(logits, texts).tolist())

    def snapshot(self) -> Any:
        self._note_positions()
        positions = [None if text is None else text.position for text in self._texts]
        return positions, None if self._tables is None else self._tables.snapshot()

    def restore(self, snapshot: Any) -> None:
        positions, tables = snapshot
        self._column, self._noted = BLOCK, [BLOCK] * len(self._texts)
        for text, position in zip(self._texts, positions, strict=True):
            if text is not None:
                text.position = position
        if self._tables is not None and tables is not None:
            self._tables.restore(tables)

    def _note_positions(self, texts: Sequence[SampledText | None] | None = None) -> None:
        for slot, text in enumerate(self._texts if texts is None else texts):
            if text is not None:
                text.position += self._column - self._noted[slot]
                self._noted[slot] = self._column

    def _update(self, device: torch.device) -> None:
        """Update parameters, random numbers and tables of the slots that have changed."""
        slots = list(range(len(self._texts))) if self._changed is None else sorted(set(self._changed))
        texts = [self._texts[i] for i in slots]
        parameters = torch.tensor(
            [_FREE if text is None else text.params.columns for text in texts], dtype=torch.float32, device="cpu"
        ).reshape(-1, len(OFF))
        numbers = np.zeros((len(texts), BLOCK))
        for row, text in enumerate(texts):
            if text is not None and self._column < BLOCK:
                numbers[row, self._column :] = text.numbers(text.position, BLOCK - self._column)
        uniform = torch.from_numpy(numbers)
        if self._changed is None:
            self._parameters, self._uniform = to_device(device, parameters), to_device(device, uniform)
        else:
            at = integers(device, slots)
            self._parameters[at], self._uniform[at] = to_device(device, parameters), to_device(device, uniform)
        self._changed = []
        changing = [text for text in self._texts if text is not None and text.changes_logits]
        if not changing:
            self._tables = None
        elif self._tables is None or not self._tables.are_of(self._texts):
            self._tables = Tables(self._texts, device)

    def _next_block(self, device: torch.device) -> None:
        self._note_positions()
        self._column, self._noted = 0, [0] * len(self._texts)
        numbers = np.zeros((len(self._texts), BLOCK))
        for row, text in enumerate(self._texts):
            if text is not None:
                numbers[row] = text.numbers(text.position, BLOCK)
        self._uniform = to_device(device, torch.from_numpy(numbers))
