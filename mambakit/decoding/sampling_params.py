"""How the next token of a text is chosen."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

BLOCK = 64  # random numbers that are made at a time


@dataclass
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; a filter or penalty at its default is off.

    Args:
        temperature: logits are divided by it.
        top_k, top_p, min_p, typical_p, epsilon_cutoff: filters; names and meanings are transformers'.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided by it where positive, else multiplied
            (arXiv 1909.05858).
        presence_penalty: taken from the logits of every token that was written before.
        frequency_penalty: the same, times how often it was written.
        logit_bias: {token: number added to its logit}.
        seed: of the text's own random numbers, which are those of a counter: the text does not depend on its neighbours. Without one
            every text differs.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, float("inf")), ("top_k", 0, float("inf")), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("typical_p", 0.0, 1.0), ("epsilon_cutoff", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between {low} and {high}")
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0, which keeps no token; use temperature 0 for greedy text")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether tokens that were read or written change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def columns(self) -> tuple[float, ...]:
        """A row of `mambakit.ops.sampling`'s parameters."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff)

    def key(self) -> int:
        """The seed, or without one a number from the operating system."""
        return secrets.randbits(64) if self.seed is None else self.seed

    def matcher(self) -> Any:
        """What follows one text through a constraint, with a method ``accept(token)`` that raises ValueError; None without one."""
        return None

    @staticmethod
    def mask(logits: Tensor, matchers: list[Any]) -> Tensor:
        """``logits`` (m, v), -inf where the matcher of a row does not allow a token; ValueError where one cannot say."""
        raise NotImplementedError


def random_numbers(seed: int, block: int) -> np.ndarray:
    """(64,) float64, uniform in [0, 1): numbers 64 * block onwards of a seed, by Philox (Salmon et al. 2011). Number i of a seed is always
    the same, whatever was asked before; 64 bits of the seed count."""
    bits = np.random.Philox(key=seed % 2**64, counter=[0, block, 0, 0]).random_raw(BLOCK)
    return (bits >> np.uint64(11)) * 2.0**-53
