"""Speculative decoding: propose several tokens cheaply, verify them in one pass, keep those that the model accepts.

Greedy text is that of plain decoding. Sampled text has the distribution of plain sampling (arXiv 2211.17192, algorithm
1; arXiv 2302.01318; `mambakit.decoding.acceptance`). A drafter changes the speed, never the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambakit.decoding.distributions import probabilities
from mambakit.decoding.drafting import Draft, Drafter, read_draft_tokens
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.slots import SlotPool
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.stream import Stream, _Writer
from mambakit.modules import StateCache


@dataclass
class SpeculativeStream(Stream):
    """A `Stream` whose tokens are proposed by a drafter and verified several at a time.

    Greedy tokens are those of `Stream`. Sampled tokens have the same distribution, but a seed gives other tokens if
    guesses are drawn. Constraints, penalties, stop strings, the start from a state and the final state are as in
    `Stream`.

    Args:
        drafter: `PromptLookup()`, `DraftModel(model)`, or another `Drafter`.
        draft_tokens: the maximum number of guesses per draft, 1 to 15.
        context: as in `Stream`; a drafter also sees these tokens as the beginning of the text.
    """

    drafter: Drafter = field(default_factory=PromptLookup)
    draft_tokens: int = 4

    proposed: int = 0
    """The number of verified guesses."""
    accepted: int = 0
    """The number of accepted guesses."""
    rounds: int = 0
    """The number of verifications, each of which reads the weights once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.draft_tokens = read_draft_tokens(self.draft_tokens)
        if isinstance(self.drafter, DraftModel):
            self.drafter.require_fit(self.model)

    def _writer(self, sampled: SampledText, cache: StateCache, known: Tensor) -> _Writer:
        return _VerifyingWriter(self, sampled, cache, known)


class _VerifyingWriter(_Writer):
    """Writes one text: each round gives the accepted guesses of a draft and one more token."""

    def __init__(self, stream: SpeculativeStream, sampled: SampledText, cache: StateCache, known: Tensor):
        super().__init__(sampled, SlotPool(stream.model, 1, cache), stream.draft_tokens)
        generator = torch.Generator(known.device)
        if stream.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(stream.sampling.seed)

        def scores(_text: list[int], logits: Tensor) -> Tensor:
            return logits if sampled.params.greedy else probabilities(sampled.params, logits).log()

        stream.drafter.begin(known, sampled.params, scores, generator)
        self._stream, self._draft = stream, Draft([])
        self._verified = False  # whether the last tokens come from a verification
        self._known: list[int] = known.tolist()  # all tokens so far

    def next(self, most: int) -> list[int]:
        stream = self._stream
        self._draft = stream.drafter.propose(self._known, min(stream.draft_tokens, most - 1))
        chosen, self._verified = self.loop.verify([self._draft])[0], True
        stream.proposed += len(self._draft.tokens)
        stream.rounds += 1
        return chosen

    def keep(self, chosen: list[int], kept: list[int], read: int) -> None:
        if self._verified:
            self.loop.keep([read])
        self._stream.accepted += min(len(kept), len(chosen) - 1)
        self._known += kept
