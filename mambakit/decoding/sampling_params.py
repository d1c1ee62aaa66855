"""How the next token of a text is chosen: temperature, filters, penalties, and the random numbers of a seed."""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from mambakit.decoding.parameters import BIAS, NEW_TOKENS, SAMPLING
from mambakit.quoting import quoted

BLOCK = 64  # random numbers are made in blocks of this many


@dataclass
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; a filter or penalty is off by default.

    Args:
        temperature: logits are divided by it.
        top_k, top_p, min_p, typical_p, epsilon_cutoff: filters, with the names and meanings of transformers.
        repetition_penalty: logits of tokens that occur in the prompt or in the text so far are divided by it if
            positive, and multiplied by it if negative (arXiv 1909.05858).
        presence_penalty: subtracted from the logit of every token that the text so far has, not counting the prompt.
        frequency_penalty: the same, times the number of occurrences.
        logit_bias: {token: number that is added to its logit}.
        seed: of the text's own counter-based random numbers. The text then does not depend on the rest of its batch.
            None: a new random seed for every text.

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
        """A validated copy, unaffected by later changes of this object."""
        copied = copy.copy(self)
        copied.__post_init__()
        return copied

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0

    @property
    def columns(self) -> tuple[float, ...]:
        """A row of `mambakit.ops.sampling`'s parameters. Temperatures are clamped to 1e-37 ... 1e30."""
        temperature = 0.0 if self.greedy else min(max(self.temperature, 1e-37), 1e30)
        return (temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff)

    def key(self) -> int:
        """The seed; without one, a random number from the operating system."""
        return secrets.randbits(64) if self.seed is None else self.seed

    def matcher(self) -> Any:
        """The constraint's state of one text, whose ``accept(token)`` raises ValueError; None without a constraint."""
        return None

    @staticmethod
    def mask(logits: Tensor, matchers: list[Any]) -> Tensor:
        """``logits`` (m, v) with -inf where the matcher of a row forbids a token. ValueError where a matcher fails."""
        raise NotImplementedError


# Each text has three sequences of random numbers; number i of each is for token i of the text.
DRAW, ACCEPT, PROPOSE = range(3)  # draws the token; accepts a guess of it; draws the guess


def random_numbers(seed: int, block: int, sequence: int = DRAW) -> np.ndarray:
    """A block of a seed's random numbers, from the counter-based generator Philox (Salmon et al. 2011).

    Args:
        seed: only its lowest 64 bits are used.
        block: the block's index: the result is numbers 64 * block to 64 * block + 63.
        sequence: `DRAW`, `ACCEPT` or `PROPOSE`.

    Returns:
        (64,) float64, uniform in [0, 1). It depends on the arguments alone.
    """
    bits = np.random.Philox(key=seed % 2**64, counter=[0, block, sequence, 0]).random_raw(BLOCK)
    return (bits >> np.uint64(11)) * 2.0**-53
