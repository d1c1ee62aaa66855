"""How the next token of a text is chosen."""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from mambakit.decoding.parameters import BIAS, NEW_TOKENS, SAMPLING
from mambakit.quoting import quoted

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
        seed: of the text's own random numbers, which are made from a counter: the text does not depend on the others of its batch.
            Without one every text differs.

    Raises:
        TypeError, ValueError: a field that is no number, or outside of its range (`mambakit.decoding.parameters`).
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
        for name, number in SAMPLING.items():
            setattr(self, name, number.read(name, getattr(self, name)))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise TypeError(f"logit_bias is {quoted(self.logit_bias)}; give a dictionary of tokens and numbers")
            token = replace(NEW_TOKENS, low=0)
            self.logit_bias = {
                token.read("a token of logit_bias", key): BIAS.read(f"logit_bias[{quoted(key)}]", value)
                for key, value in self.logit_bias.items()
            }

    def snapshot(self) -> SamplingParams:
        """A copy, checked again, that no later change of this one reaches."""
        copied = copy.copy(self)
        copied.__post_init__()
        return copied

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def columns(self) -> tuple[float, ...]:
        """A row of `mambakit.ops.sampling`'s parameters. Temperatures beyond float32's range have the limit's distribution."""
        temperature = 0.0 if self.greedy else min(max(self.temperature, 1e-37), 1e30)
        return (temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff)

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


# Each text has several sequences of random numbers, of which number i belongs to its token i.
DRAW, ACCEPT, PROPOSE = range(3)  # the token itself; whether a guess of it is kept; the guess


def random_numbers(seed: int, block: int, sequence: int = DRAW) -> np.ndarray:
    """(64,) float64, uniform in [0, 1): numbers 64 * block onwards of one of a seed's sequences, by Philox (Salmon et al. 2011). Number i
    is always the same, whatever was asked before; 64 bits of the seed count."""
    bits = np.random.Philox(key=seed % 2**64, counter=[0, block, sequence, 0]).random_raw(BLOCK)
    return (bits >> np.uint64(11)) * 2.0**-53
