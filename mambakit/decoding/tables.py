"""Changes of logits before a token is chosen: constraint masks, biases and penalties of several texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.transfers import integers, to_device
from mambakit.ops.sampling.api import NO_TOKEN

_LARGE = 3e38


class Tables:
    """The tables (m, v) of the m texts among ``texts`` that change their logits. Each text's own tables become views of
    their rows.

    Args:
        texts: the text of each slot; None where a slot is free.
        device: of the logits.
    """

    def __init__(self, texts: Sequence[SampledText | None], device: torch.device):
        found = [(slot, text) for slot, text in enumerate(texts) if text is not None and text.changes_logits]
        self._found, changed = found, [text for _, text in found]
        self._whole = len(found) == len(texts)
        slots = [slot for slot, _ in found]
        self._slots = slice(None) if self._whole else integers(device, slots)
        self._masked = [(row, text) for row, text in enumerate(changed) if text.matcher is not None]
        self._seen = _stacked(changed, "seen", torch.bool)
        self._counts = _stacked(changed, "counts", torch.float32)
        self._bias = _stacked(changed, "bias", torch.float32)
        self._held = _stacked(changed, "held", torch.int64)  # (m, 1)
        if self._held is not None:  # (m, v) each text's end-of-text tokens
            self._ends = torch.zeros(len(changed), changed[0].vocab_size, dtype=torch.bool, device="cpu")
            for row, text in enumerate(changed):
                self._ends[row, text.ends] = text.held is not None
            self._ends = to_device(device, self._ends)
        penalties = [[min(max(text.params.repetition_penalty, 1e-30), 1e30)] for text in changed]
        self._repetition = _table(penalties, device)  # (m, 1)
        self._presence = _table([[text.params.presence_penalty] for text in changed], device)
        self._frequency = _table([[text.params.frequency_penalty] for text in changed], device)
        self._penalised = (self._presence != 0) | (self._frequency != 0)

    def are_of(self, texts: Sequence[SampledText | None]) -> bool:
        """Whether these are the tables of ``texts``."""
        found = [(slot, text) for slot, text in enumerate(texts) if text is not None and text.changes_logits]
        return found == self._found and self._whole == (len(found) == len(texts))

    def change(self, logits: Tensor) -> Tensor:
        """``logits`` (size, v) with masks, biases and penalties applied, as a new tensor."""
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        x = wide[self._slots]
        if self._masked:
            x = self._mask(x.clone())
        if self._bias is not None:
            x = x + self._bias
        if self._seen is not None:  # all False in rows of texts without the penalty
            scaled = x * torch.where(x < 0, self._repetition, 1 / self._repetition)
            # The largest penalties overflow float32: clamp to a large number.
            scaled = torch.where(x.isfinite(), scaled.clamp(-_LARGE, _LARGE), scaled)
            x = torch.where(self._seen, scaled, x)
        if self._counts is not None:
            x = x - self._presence * (self._counts > 0) - self._frequency * self._counts
        if self._held is not None:
            x = x.masked_fill(self._ends & (self._held > 0), -float("inf"))
        return x if isinstance(self._slots, slice) else wide.index_copy(0, self._slots, x)

    def _mask(self, x: Tensor) -> Tensor:
        rows, texts = [row for row, _ in self._masked], [text for _, text in self._masked]
        try:
            x[rows] = texts[0].params.mask(x[rows], [text.matcher for text in texts])
        except Exception:  # one constraint failed: mask row by row, so that the other texts continue
            for row, text in self._masked:
                try:
                    x[row : row + 1] = text.params.mask(x[row : row + 1], [text.matcher])
                except Exception as error:
                    text.fail(error)
        return x

    def count(self, tokens: Tensor) -> None:
        """Count the chosen tokens (size,) for penalties, and towards the texts' least lengths."""
        if self._held is not None:
            self._held.sub_(1)
        if self._seen is None and self._counts is None:
            return
        written = tokens[self._slots][:, None]
        there = written != NO_TOKEN
        at = written.clamp(min=0)
        for text_has, table in ((self._repetition != 1, self._seen), (self._penalised, self._counts)):
            if table is not None:
                table.scatter_(1, at, table.gather(1, at) + (there & text_has))

    @property
    def _counters(self) -> tuple[Tensor | None, ...]:
        return self._seen, self._counts, self._held

    def snapshot(self) -> list[Tensor | None]:
        return [None if table is None else table.clone() for table in self._counters]

    def restore(self, snapshot: list[Tensor | None]) -> None:
        """Restore a snapshot, in place, because the texts' own tables are views."""
        for table, before in zip(self._counters, snapshot, strict=True):
            if table is not None and before is not None:
                table.copy_(before)


def _stacked(texts: list[SampledText], name: str, dtype: torch.dtype) -> Tensor | None:
    """(m, v), whose rows become the texts' own tables; None where no text has one."""
    tables = [getattr(text, name) for text in texts]
    one = next((table for table in tables if table is not None), None)
    if one is None:
        return None
    nothing = torch.zeros(one.shape, dtype=dtype, device=one.device)
    stacked = torch.stack([nothing if table is None else table for table in tables])
    for text, table, row in zip(texts, tables, stacked, strict=True):
        if table is not None:
            setattr(text, name, row)
    return stacked


def _table(values: Any, device: torch.device) -> Tensor:
    return to_device(device, torch.tensor(values, dtype=torch.float32, device="cpu"))
