"""Speculative decoding: propose several tokens cheaply, verify them in one pass, keep those that the model accepts.

Greedy text is that of plain decoding. Sampled text has the distribution of plain sampling (arXiv 2211.17192, algorithm
1; arXiv 2302.01318; `mambakit.decoding.acceptance`). A drafter changes the speed, never the distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambakit.decoding.distributions import probabilities
from mambakit.decoding.draft_model import draft_cost
from mambakit.decoding.draft_rounds import WrittenText
from mambakit.decoding.drafting import NO_DRAFT, Draft, Drafter, drafters_generator, read_draft_tokens
from mambakit.decoding.guess_count import Guesses
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.decoding.slots import SlotPool
from mambakit.decoding.speculation import Speculation
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.stream import Stream, _end_tokens, _Writer
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
        drafter, device = stream.drafter, known.device
        own = drafter.for_slots(1) if isinstance(drafter, DraftModel) else _OneText(drafter, sampled, device)
        self._stream, self._prompt, self._begun = stream, known, False
        self._speculation = Speculation(
            self.loop, own, 1, stream.draft_tokens, draft_cost(drafter, stream.model), may_cut=bool(stream.stop)
        )
        self._verified = False  # whether the last tokens come from a round

    def __exit__(self, *error: object) -> None:
        self._speculation.close()
        super().__exit__(*error)

    def first(self, logits: Tensor) -> list[int]:
        stream, chosen = self._stream, super().first(logits)
        known = [*self._prompt.tolist(), *chosen]
        ends = frozenset(_end_tokens(stream.model))
        text = WrittenText(self.sampled, known, 1, stream.max_new_tokens, ends)
        self._speculation.begin(0, text, self._prompt, stream.draft_tokens)
        return chosen

    def next(self, most: int) -> list[int]:
        stream, before = self._stream, self._speculation.proposed
        while (found := self._speculation.round()) is None:
            pass
        self._verified = True
        stream.proposed += self._speculation.proposed - before
        stream.rounds += 1
        return found.tokens[0]

    def keep(self, chosen: list[int], kept: list[int], read: int) -> None:
        if self._verified:
            self._speculation.settle([read])
        self._stream.accepted += min(len(kept), len(chosen) - 1)


class _OneText:
    """A `SlotDrafter` of one slot that is the stream's own `Drafter`."""

    def __init__(self, drafter: Drafter, sampled: SampledText, device: torch.device):
        self._drafter, self._sampled, self._device = drafter, sampled, device

    def begin(self, slot: int, ids: Tensor, sampling: SamplingParams, written: Sequence[int] = ()) -> None:
        self._drafter.begin(ids, sampling, self._scores, drafters_generator(sampling, self._device))

    def _scores(self, _text: list[int], logits: Tensor) -> Tensor:
        params = self._sampled.params
        return logits if params.greedy else probabilities(params, logits).log()

    def propose(self, texts: Sequence[list[int] | None], guesses: Sequence[Guesses]) -> list[Draft]:
        (text,), ((most, _),) = texts, guesses
        return [self._drafter.propose(text, most) if text is not None and most else NO_DRAFT]

    def release(self, slot: int) -> None:
        """The stream ends with its text."""

    def close(self) -> None:
        """See `SlotDrafter`."""
