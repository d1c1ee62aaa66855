"""Drafters: proposals of the next tokens, from the text itself or from a smaller model. `speculative` verifies them."""

from __future__ import annotations

from array import array
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.acceptance import draw, probabilities
from mambakit.decoding.drafting import Draft as Draft
from mambakit.decoding.drafting import Drafter as Drafter
from mambakit.decoding.drafting import Scores
from mambakit.decoding.logits import NO_CHOICE
from mambakit.decoding.loop import TokenLoop
from mambakit.decoding.prefill import prefill_states
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import PROPOSE, SamplingParams
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.tables import Tables
from mambakit.errors import LogitsError
from mambakit.ops.sampling.api import NO_TOKEN
from mambakit.quoting import brief

# The number of earlier occurrences that prompt lookup compares, latest first.
_CANDIDATES = 64


class PromptLookup:
    """Proposes the tokens that followed an earlier occurrence of the last tokens. It is free, and needs no draft model.

    It is good where text repeats itself: code, lists, quotations, summaries of the prompt.

    Args:
        longest, shortest: the length of the match, in tokens. The longest match wins, and of equal ones the latest.
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {brief(shortest)} and longest {brief(longest)}; they must be 1 <= shortest <= longest"
            )
        self.longest, self.shortest = longest, shortest

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        # For each n-gram (n = `shortest`) the end of its latest occurrence, and for each end that of the occurrence
        # before: 8 bytes per token of the text, and one entry per distinct n-gram.
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = array("q", [-1])

    def propose(self, text: list[int], most: int) -> Draft:
        n = self.shortest
        for end in range(len(self._earlier), len(text)):  # nothing follows an n-gram at the very end yet
            run = tuple(text[max(0, end - n) : end])
            self._earlier.append(self._latest.get(run, -1))
            self._latest[run] = end
        place, longest = -1, 0
        at = self._latest.get(tuple(text[-n:]), -1)
        for _ in range(_CANDIDATES):
            if at < 0 or longest == self.longest:
                break
            same = n
            while same < min(self.longest, at) and text[at - same - 1] == text[len(text) - same - 1]:
                same += 1
            if same > longest:
                place, longest = at, same
            at = self._earlier[at]
        return Draft(text[place : place + most] if place >= 0 else [])


class DraftModel:
    """Proposes tokens with a smaller model of the same vocabulary, chosen with the sampling parameters of the large
    model.

    Its state is copied before each guess and rolled back by restoring a copy: for a small model that is cheaper than
    reading the text again. All guesses of a draft are made on the device, with one device-to-host sync.

    Args:
        model: a causal language model in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._loop: TokenLoop | None = None

    @torch.no_grad()
    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        if self._loop is not None:
            self._loop.pool.close()
        cache = self.model.backbone.new_cache(1)
        ids = ids.to(self.model.device)
        prefill_states(self.model, [ids[:-1]], cache)
        self._sampler = _Proposing(sampling, self.model.config.vocab_size, ids)
        self._loop = TokenLoop(SlotPool(self.model, 1, cache), self._sampler, ids[-1:])
        self._read: list[int] = ids[:-1].tolist()
        # snapshots[i]: the state after the first _base + i tokens of _read
        self._base, self._snapshots = len(self._read), [self._loop.pool.snapshot()]

    @torch.no_grad()
    def propose(self, text: list[int], most: int) -> Draft:
        loop = self._loop
        assert loop is not None
        known = _agreement(self._read, text, self._base)
        if known < len(self._read):
            loop.pool.go_back(self._snapshots[known - self._base])
            del self._read[known:]
        self._base, self._snapshots = known, [loop.pool.snapshot()]
        self._sampler.follow(text)
        for token in text[known:-1]:
            loop.read(torch.tensor([token], dtype=torch.int64, device=self.model.device))
            self._read.append(token)
            self._snapshots.append(loop.pool.snapshot())
        loop.tokens = torch.tensor(text[-1:], dtype=torch.int64, device=self.model.device)
        if not most:
            return Draft([])
        guesses = []
        for _ in range(most):
            guesses.append(loop.write()[0])
            self._snapshots.append(loop.pool.snapshot())
        found: list[int] = torch.cat(guesses, 1)[0].tolist()
        if NO_TOKEN in found:
            raise LogitsError(NO_CHOICE)
        self._read += [text[-1], *found[:-1]]
        return Draft(found, self._sampler.probabilities())


class _Proposing:
    """A `Chooser` for guesses. They have their own random numbers, and their distributions are kept for the acceptance
    test.

    Penalties and biases apply as in the text itself; constraints do not.
    """

    def __init__(self, sampling: SamplingParams, vocab_size: int, read: Tensor):
        params = SamplingParams(**{f.name: getattr(sampling, f.name) for f in fields(SamplingParams)})
        self._text = SampledText(params, vocab_size, read.device, read)
        self._tables = Tables([self._text], read.device) if self._text.changes_logits else None
        self._before = [] if self._tables is None else self._tables.snapshot()
        self._device, self._prompt = read.device, len(read)
        self._counted = len(read)  # tokens of the text that the tables have counted
        self._place = 0  # the next guess's position in the text
        self._kept: list[Tensor] = []
        self.plain = self._text.plain

    def follow(self, text: list[int]) -> None:
        """Start a draft after ``text``, all tokens so far."""
        if self._tables is not None:
            self._tables.restore(self._before)  # without the guesses of the last draft
            for token in text[self._counted :]:
                self._tables.count(torch.tensor([token], dtype=torch.int64, device=self._device))
            self._before = self._tables.snapshot()
        self._counted, self._place, self._kept = len(text), len(text) - self._prompt, []

    def sample(self, logits: Tensor) -> Tensor:
        if self._tables is not None:
            logits = self._tables.change(logits)
        if self._text.params.greedy:
            token = logits.argmax(-1)
        else:
            self._kept.append(probabilities(self._text.params, logits))
            token = draw(self._kept[-1], self._text.numbers(self._place, 1, PROPOSE))
        self._place += 1
        if self._tables is not None:
            self._tables.count(token)
        return token

    def probabilities(self) -> Tensor | None:
        """(t, v) of the guesses since `follow`; None where they are certain."""
        return torch.cat(self._kept) if self._kept else None

    def select(self, kept: list[int]) -> None:
        """Nothing to do: there is one slot."""

    def snapshot(self) -> None:
        """Nothing: `follow` sets the position."""

    def restore(self, snapshot: None) -> None:
        """See `snapshot`."""


def _agreement(read: list[int], text: list[int], start: int) -> int:
    """The length of the common prefix of ``read`` and ``text[:-1]``, which is at least ``start``."""
    n = start
    while n < min(len(read), len(text) - 1) and read[n] == text[n]:
        n += 1
    return n
