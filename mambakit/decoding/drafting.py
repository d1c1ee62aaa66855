"""Drafts of the next tokens, and the interface of drafters that propose them."""

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
    """(t, v) floating, the distributions that they were drawn from; None: they are certain (by a rule, or greedy)."""


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
