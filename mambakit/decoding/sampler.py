"""The next token of many texts at once: each slot of a pool has its own parameters, random numbers and constraint.

In a few launches for all slots: constraint masks, biases and penalties where a slot has them, then one launch of
`mambakit.ops.sampling`. The device is waited for once, when the tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.sampling_params import BLOCK, SamplingParams, random_numbers
from mambakit.models.choosing import NO_CHOICE
from mambakit.ops.sampling.api import NO_TOKEN, sample


@dataclass
class _Text:
    params: SamplingParams
    key: int
    matcher: Any

    @property
    def changes_logits(self) -> bool:
        return self.params.penalises or bool(self.params.logit_bias) or self.matcher is not None


class _Batch:
    """What stays the same from one token of some slots to the next."""

    def __init__(self, slots: Sequence[int], texts: list[_Text | None], device: torch.device):
        self.slots = np.array(slots, dtype=np.int64)
        greedy = SamplingParams(temperature=0)
        params = [greedy if text is None else text.params for text in texts]
        self.parameters = _table([p.columns for p in params], device)
        self.draws = any(not p.greedy for p in params)
        self.matched = [(i, t.matcher) for i, t in enumerate(texts) if t is not None and t.matcher is not None]
        changed = [i for i, t in enumerate(texts) if t is not None and t.changes_logits]
        self.rows = torch.tensor(changed, dtype=torch.int64, device=device) if changed else None
        self.all_rows = len(changed) == len(texts)
        self.of = torch.tensor([slots[i] for i in changed], dtype=torch.int64, device=device)
        self.masked = [(j, params[i], texts[i].matcher) for j, i in enumerate(changed) if texts[i].matcher is not None]  # type: ignore[union-attr]
        theirs = [params[i] for i in changed]
        self.repetition = self._column([p.repetition_penalty for p in theirs], 1, device)
        self.presence = self._column([p.presence_penalty for p in theirs], 0, device)
        self.frequency = self._column([p.frequency_penalty for p in theirs], 0, device)
        self.biased = self._column([float(bool(p.logit_bias)) for p in theirs], 0, device)

    @staticmethod
    def _column(values: list[float], off: float, device: torch.device) -> Tensor | None:
        """(m, 1), or None where all are off."""
        return _table([[v] for v in values], device) if any(v != off for v in values) else None


class Sampler:
    """Chooses tokens for the texts in a pool of slots.

    Args:
        vocab_size: v.
        device: where logits lie.
        slots: how many there are at first, all empty.
    """

    def __init__(self, vocab_size: int, device: torch.device, slots: int = 0):
        self.vocab_size, self.device = vocab_size, device
        self._texts: list[_Text | None] = [None] * slots
        self._positions = np.zeros(slots, dtype=np.int64)  # tokens chosen so far
        # A text's random numbers: block ``_blocks`` of them.
        self._numbers, self._blocks = np.zeros((slots, BLOCK), dtype=np.float64), np.full(slots, -1, dtype=np.int64)
        self._errors: dict[int, str] = {}
        # (slots, v), made when a text first needs them: what was read or written, how often it was written, biases.
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        self._batch: tuple[tuple[int, ...], _Batch] | None = None  # of the last call, until a slot changes

    def __len__(self) -> int:
        return len(self._texts)

    def resize(self, kept: Sequence[int], slots: int) -> None:
        """Go on with ``slots`` slots: the first are what ``kept`` were, the others empty."""
        kept, added = list(kept), slots - len(kept)
        self._texts = [self._texts[i] for i in kept] + [None] * added
        self._positions = np.pad(self._positions[kept], (0, added))
        self._numbers = np.pad(self._numbers[kept], ((0, added), (0, 0)))
        self._blocks = np.pad(self._blocks[kept], (0, added), constant_values=-1)
        self._errors.clear()
        self._batch = None
        self._seen, self._counts, self._bias = (
            None if table is None else torch.cat([table[kept], table.new_zeros(added, self.vocab_size)])
            for table in (self._seen, self._counts, self._bias)
        )

    def put(self, slot: int, params: SamplingParams, read: Tensor, written: Sequence[int] = ()) -> None:
        """A text in ``slot``: it has read the prompt ``read`` (p,) and then written these tokens; it goes on as if it had been here
        from the beginning, given the same seed."""
        self._batch = None
        self._errors.pop(slot, None)
        matcher = params.matcher()
        for token in written if matcher is not None else ():
            matcher.accept(token)
        self._texts[slot] = _Text(params, params.key(), matcher)
        self._positions[slot] = len(written)
        self._blocks[slot] = -1
        tokens = torch.tensor(list(written), dtype=torch.int64, device=self.device)
        if params.repetition_penalty != 1:
            self._seen = self._made(self._seen, torch.bool)
            self._seen[slot] = False
            self._seen[slot, torch.cat([read.to(self.device), tokens])] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = self._made(self._counts, torch.float32)
            self._counts[slot] = tokens.bincount(minlength=self.vocab_size)
        if params.logit_bias:
            self._bias = self._made(self._bias, torch.float32)
            self._bias[slot] = 0
            biased = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self.device)
            self._bias[slot, biased] = _table(list(params.logit_bias.values()), self.device)

    def drop(self, slot: int) -> None:
        """The text in ``slot`` is over."""
        self._texts[slot] = None
        self._batch = None

    def plain(self, slots: Sequence[int]) -> bool:
        """Whether all of these want the most probable token of the logits as they are."""
        return all(t is None or (t.params.greedy and not t.changes_logits) for t in (self._texts[i] for i in slots))

    def error(self, slot: int) -> str:
        """Why no token could be chosen for ``slot`` the last time."""
        return self._errors.get(slot, NO_CHOICE)

    @torch.no_grad()
    def choose(self, logits: Tensor, slots: Sequence[int]) -> list[int]:
        """The next token of each of ``slots``, from logits (m, v), a row each; `NO_TOKEN` where none can be chosen, and `error` says
        why. What is chosen belongs to the text: the next call goes on from there."""
        self._errors.clear()
        key = tuple(slots)
        if self._batch is None or self._batch[0] != key:
            self._batch = key, _Batch(key, [self._texts[i] for i in key], self.device)
        batch = self._batch[1]
        tokens: list[int] = self._sample(logits, batch).tolist()
        self._positions[batch.slots] += 1
        for slot in self._errors:
            tokens[key.index(slot)] = NO_TOKEN
        for i, matcher in batch.matched:
            if tokens[i] != NO_TOKEN:
                try:
                    matcher.accept(tokens[i])
                except ValueError as error:
                    self._errors[key[i]], tokens[i] = str(error), NO_TOKEN
        return tokens

    def take(self, slots: Sequence[int]) -> None:
        """Each of these texts, which are `plain`, has had its next token chosen elsewhere."""
        self._positions[list(slots)] += 1

    def _sample(self, logits: Tensor, batch: _Batch) -> Tensor:
        if batch.rows is not None:
            wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
            changed = self._changed(wide if batch.all_rows else wide[batch.rows], batch)
            logits = changed if batch.all_rows else wide.index_copy(0, batch.rows, changed)
        if batch.draws:
            uniform = torch.from_numpy(self._uniform(batch.slots)).to(logits.device, non_blocking=True)
        else:
            uniform = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        tokens = sample(logits, uniform, batch.parameters)
        if batch.rows is not None and (self._seen is not None or self._counts is not None):
            written = tokens[batch.rows]
            there = written != NO_TOKEN
            at = batch.of, written.clamp(min=0)
            if self._seen is not None:
                self._seen[at] |= there
            if self._counts is not None:
                self._counts[at] += there
        return tokens

    def _uniform(self, slots: np.ndarray) -> np.ndarray:
        blocks, at = np.divmod(self._positions[slots], BLOCK)
        for i in np.flatnonzero(self._blocks[slots] != blocks):
            slot = slots[i]
            if (text := self._texts[slot]) is not None:
                self._numbers[slot], self._blocks[slot] = random_numbers(text.key, int(blocks[i])), blocks[i]
        return self._numbers[slots, at]

    def _changed(self, x: Tensor, batch: _Batch) -> Tensor:
        """x (m, v), the logits of the slots that change theirs, with masks, biases and penalties; x itself stays."""
        if batch.masked:
            x = self._mask(x.clone(), batch)
        if batch.biased is not None:
            assert self._bias is not None
            x = x + torch.where(batch.biased > 0, self._bias[batch.of], 0.0)
        if batch.repetition is not None:
            assert self._seen is not None
            factor = torch.where(x < 0, batch.repetition, 1 / batch.repetition)
            x = torch.where(self._seen[batch.of] & (batch.repetition != 1), x * factor, x)
        if batch.frequency is not None or batch.presence is not None:
            assert self._counts is not None
            counts = self._counts[batch.of]
            # A slot without such a penalty may hold an older text's counts: its factors are 0.
            if batch.presence is not None:
                x = x - batch.presence * (counts > 0)
            if batch.frequency is not None:
                x = x - batch.frequency * counts
        return x

    def _mask(self, x: Tensor, batch: _Batch) -> Tensor:
        rows, matchers = [j for j, _, _ in batch.masked], [matcher for _, _, matcher in batch.masked]
        try:
            x[rows] = batch.masked[0][1].mask(x[rows], matchers)
        except ValueError:  # one of them cannot go on: the others do
            for j, params, matcher in batch.masked:
                try:
                    x[j : j + 1] = params.mask(x[j : j + 1], [matcher])
                except ValueError as error:
                    self._errors[int(batch.of[j])] = str(error)
        return x

    def _made(self, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        if table is not None:
            return table
        return torch.zeros(len(self), self.vocab_size, dtype=dtype, device=self.device)


def _table(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
