"""Guesses of the next tokens, and who makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mambakit.decoding.sampling_params import SamplingParams

Scores = Callable[[list[int], Tensor], Tensor]


@dataclass(frozen=True)
class Draft:
    """Guesses of the next tokens."""

    tokens: list[int]
    probabilities: Tensor | None = None
    """(t, v) floating, the distributions they were drawn from; None where they are certain (a rule, or greedy)."""


class Drafter(Protocol):
    """Guesses what comes next. One drafter serves one text at a time."""

    def begin(self, ids: Tensor, sampling: SamplingParams, scores: Scores | None, generator: torch.Generator) -> None:
        """A new text.

        Args:
            ids: (l,) int64, the prompt.
            sampling: how its tokens are chosen.
            scores: ``(text, logits (t, v)) -> (t, v)``, of which the softmax is the distribution that tokens are drawn from, but for
                penalties and constraints. Guesses drawn from it stay more often.
            generator: for random numbers; seeded like the text.
        """

    def propose(self, text: list[int], most: int) -> Draft:
        """At most ``most`` guesses of what follows ``text``, all tokens so far (the last one is not read by the model yet)."""
