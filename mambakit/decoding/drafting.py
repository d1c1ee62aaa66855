"""Drafts of the next tokens, and the interfaces of drafters that propose them: for one text, and for several slots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.decoding.guess_count import Guesses
from mambakit.decoding.parameters import INT64, Number
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.ops.linear.api import MOST_ROWS

Scores = Callable[[list[int], Tensor], Tensor]


@dataclass(frozen=True)
class Draft:
    """Guesses of the next tokens."""

    tokens: list[int]
    probabilities: Tensor | None = None
    """(t, v) floating, the distributions that they were drawn from; None: they are certain (by a rule, or greedy)."""


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """Proposes the next tokens. A drafter serves one text at a time."""

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        """Start a new text.

        Args:
            ids: (l,) int64, the prompt.
            sampling: how its tokens are chosen.
            scores: ``(text, logits (t, v)) -> (t, v)``, whose softmax is the distribution that tokens are drawn from,
                except for penalties and constraints. Guesses drawn from it are accepted more often.
            generator: for random numbers, seeded like the text.
        """

    def propose(self, text: list[int], most: int) -> Draft:
        """At most ``most`` guesses of what follows ``text``, all tokens so far. The model has not read the last one."""


class SlotDrafter(Protocol):
    """Proposes the next tokens of the texts of several slots."""

    def begin(self, slot: int, ids: Tensor, sampling: SamplingParams, written: Sequence[int] = ()) -> None:
        """Start a text of a slot.

        Args:
            ids: (l,) int64, l >= 1, its prompt.
            sampling: how its tokens are chosen.
            written: its tokens after the prompt, so far.
        """

    def propose(self, texts: Sequence[list[int] | None], guesses: Sequence[Guesses]) -> list[Draft]:
        """A draft for every slot.

        Args:
            texts: of each slot all tokens so far, of which the model has not read the last one; None: it is free, or
                has no drafter.
            guesses: the maximum number of guesses of each slot, and of tokens that a draft model reads for them.
        """

    def release(self, slot: int) -> None:
        """The text of the slot has ended."""

    def close(self) -> None:
        """Nothing more is proposed: give back what is kept with a model."""


def drafters_generator(sampling: SamplingParams, device: torch.device) -> torch.Generator:
    """The generator that a drafter of a text is given, seeded like the text; without a seed by the system."""
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


class DrafterPerSlot:
    """A `SlotDrafter` that is a `Drafter` for each slot.

    Args:
        drafter: copied (`copy.copy`) for each text.
        slots: how many.
        device: of the generators that drafters are given.
    """

    def __init__(self, drafter: Drafter, slots: int, device: torch.device):
        self._drafter, self._device = drafter, device
        self._of: list[Drafter | None] = [None] * slots

    def begin(self, slot: int, ids: Tensor, sampling: SamplingParams, written: Sequence[int] = ()) -> None:
        generator = drafters_generator(sampling, self._device)
        drafter = copy.copy(self._drafter)
        drafter.begin(ids, sampling, None, generator)
        self._of[slot] = drafter

    def propose(self, texts: Sequence[list[int] | None], guesses: Sequence[Guesses]) -> list[Draft]:
        drafts = []
        for drafter, text, (limit, _) in zip(self._of, texts, guesses, strict=True):
            asked = drafter is not None and text is not None and limit > 0
            drafts.append(drafter.propose(text, limit) if asked else NO_DRAFT)  # type: ignore[union-attr, arg-type]
        return drafts

    def release(self, slot: int) -> None:
        self._of[slot] = None

    def close(self) -> None:
        """See `SlotDrafter`."""


def read_draft_tokens(value: Any, least: int = 1, name: str = "draft_tokens") -> int:
    """The maximum number of guesses per draft.

    Raises:
        TypeError, ValueError: no whole number, or outside of ``least`` to 15.
    """
    number = Number(4, *INT64, whole=True).read(name, value)
    if not least <= number < MOST_ROWS:
        raise ValueError(f"{name} is {number}; it must be between {least} and {MOST_ROWS - 1}")
    return number
