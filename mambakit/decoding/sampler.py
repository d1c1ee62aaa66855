"""The next token of many texts at once: each has its own parameters, random numbers and constraint.

In a few launches for all of them: constraint masks, biases and penalties where a text has them, then one launch of
`mambakit.ops.sampling`. The device is waited for once, when the tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.decoding.choosing import NO_CHOICE
from mambakit.decoding.sampling_params import BLOCK, SamplingParams, random_numbers
from mambakit.ops.sampling.api import NO_TOKEN, sample
from mambakit.quoting import cut

_LARGE = 3e38


class SampledText:
    """What choosing the tokens of one text needs to know of it, whatever it is batched with.

    Args:
        params: how tokens are chosen.
        vocab_size: v.
        device: where logits lie.
        read: (p,) int64, the prompt: what a repetition penalty counts, too.

    Attributes:
        error: why the last token could not be chosen; "" where it could.
        exception: what its constraint raised then, if that was why.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device, read: Tensor):
        # Others may use and change the same object, and tables are made of it whenever the batch changes.
        self.params, self.position = params.snapshot(), 0
        params = self.params
        self.error: str = ""
        self.exception: Exception | None = None
        self.matcher = params.matcher()
        self._key, self._block, self._numbers = params.key(), -1, np.empty(0, dtype=np.float64)
        # (v,) each, where it is needed: what was read or written, how often it was written, biases.
        self.seen = self.counts = self.bias = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[read.to(device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        if params.logit_bias:
            self.bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            if (largest := max(params.logit_bias)) >= vocab_size:
                raise ValueError(f"logit_bias names token {largest}; the model's are 0 to {vocab_size - 1}")
            tokens = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
            self.bias[tokens] = _table(list(params.logit_bias.values()), device)

    @property
    def changes_logits(self) -> bool:
        """Whether a token is chosen from other logits than the model's."""
        return any(part is not None for part in (self.matcher, self.seen, self.counts, self.bias))

    @property
    def plain(self) -> bool:
        """Whether it wants the most probable token of the logits as they are. Such a token may be chosen elsewhere."""
        return self.params.greedy and not self.changes_logits

    def uniform(self) -> float:
        """The random number of the next token; a text without a choice takes none."""
        if self.params.greedy:
            return 0.0
        block, at = divmod(self.position, BLOCK)
        if block != self._block:
            self._block, self._numbers = block, random_numbers(self._key, block)
        return float(self._numbers[at])

    def accept(self, token: int) -> int:
        """The token, which is now the text's; `NO_TOKEN` where it cannot be."""
        if token == NO_TOKEN or self.error:
            self.error = self.error or NO_CHOICE
            return NO_TOKEN
        if self.matcher is not None:
            try:
                self.matcher.accept(token)
            except Exception as error:  # of a constraint: its text ends alone
                self.fail(error)
                return NO_TOKEN
        self.position += 1
        return token

    def fail(self, error: Exception) -> None:
        """Its constraint raised: the text has no next token. Raises what no text survives."""
        if isinstance(error, torch.AcceleratorError):  # the device answers nobody any more
            raise error
        self.exception, self.error = error, f"{type(error).__name__}: {cut(str(error), 500)}"


class Sampler:
    """Chooses the tokens of texts, all in one batch. What stays from one token to the next is made once for a batch."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None

    @torch.no_grad()
    def choose(self, logits: Tensor, texts: Sequence[SampledText]) -> list[int]:
        """The next token of each of ``texts``, from logits (m, v), a row each; `NO_TOKEN` where none can be chosen, and `SampledText.error`
        says why, of that text alone. What is chosen belongs to the text: the next call goes on from there."""
        if self._batch is None or self._batch.texts != list(texts):
            self._batch = _Batch(list(texts), logits.device)
        batch = self._batch
        for text in texts:
            text.error, text.exception = "", None
        changed = batch.change(logits)
        uniform = torch.zeros(len(texts), dtype=torch.float64, device="cpu")
        if batch.draws:
            uniform = torch.from_numpy(np.fromiter((text.uniform() for text in texts), np.float64, len(texts)))
        tokens = sample(changed, uniform.to(logits.device, non_blocking=True), batch.parameters)
        batch.count(tokens)
        return [text.accept(token) for text, token in zip(texts, tokens.tolist(), strict=True)]


class _Batch:
    """Texts that are chosen for together: their parameters as tensors, and the tables of those that change their logits."""

    def __init__(self, texts: list[SampledText], device: torch.device):
        self.texts = texts
        self.parameters = _table([text.params.columns for text in texts], device).reshape(-1, 6)
        self.draws = any(not text.params.greedy for text in texts)
        rows = [i for i, text in enumerate(texts) if text.changes_logits]
        changed = [texts[i] for i in rows]
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device) if rows else None
        self.whole = len(rows) == len(texts)
        self.masked = [(j, text) for j, text in enumerate(changed) if text.matcher is not None]
        self.seen = self._stack(changed, "seen", torch.bool)
        self.counts = self._stack(changed, "counts", torch.float32)
        self.bias = self._stack(changed, "bias", torch.float32)
        penalties = [[min(max(text.params.repetition_penalty, 1e-30), 1e30)] for text in changed]
        self.repetition = _table(penalties, device)  # (m, 1)
        self.presence = _table([[text.params.presence_penalty] for text in changed], device)
        self.frequency = _table([[text.params.frequency_penalty] for text in changed], device)

    @staticmethod
    def _stack(texts: list[SampledText], name: str, dtype: torch.dtype) -> Tensor | None:
        """(m, v), of which each text's own table is from now on a row; None where no text has one."""
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

    def change(self, logits: Tensor) -> Tensor:
        """``logits`` (b, v) with masks, biases and penalties; they themselves stay."""
        if self.rows is None:
            return logits
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        x = wide if self.whole else wide[self.rows]
        if self.masked:
            x = self._mask(x.clone())
        if self.bias is not None:
            x = x + self.bias
        if self.seen is not None:  # a text without the penalty has seen nothing
            scaled = x * torch.where(x < 0, self.repetition, 1 / self.repetition)
            # The largest penalties leave float32's range; their limit is a large number.
            scaled = torch.where(x.isfinite(), scaled.clamp(-_LARGE, _LARGE), scaled)
            x = torch.where(self.seen, scaled, x)
        if self.counts is not None:
            x = x - self.presence * (self.counts > 0) - self.frequency * self.counts
        return x if self.whole else wide.index_copy(0, self.rows, x)

    def _mask(self, x: Tensor) -> Tensor:
        rows, texts = [j for j, _ in self.masked], [text for _, text in self.masked]
        try:
            x[rows] = texts[0].params.mask(x[rows], [text.matcher for text in texts])
        except Exception:  # of one constraint: which one, and the others go on
            for j, text in self.masked:
                try:
                    x[j : j + 1] = text.params.mask(x[j : j + 1], [text.matcher])
                except Exception as error:
                    text.fail(error)
        return x

    def count(self, tokens: Tensor) -> None:
        """Take up the tokens (b,) that were chosen."""
        if self.rows is None or (self.seen is None and self.counts is None):
            return
        written = tokens[self.rows][:, None]
        there = written != NO_TOKEN
        for text_has, table in ((self.repetition != 1, self.seen), (self._counted, self.counts)):
            if table is not None:
                at = written.clamp(min=0)
                table.scatter_(1, at, table.gather(1, at) + (there & text_has))

    @property
    def _counted(self) -> Tensor:
        return (self.presence != 0) | (self.frequency != 0)


def _table(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
