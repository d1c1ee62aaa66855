"""One token of one text, and constraints that raise."""

from __future__ import annotations

import torch

from mambakit.decoding.sampler import SampledText, Sampler
from mambakit.decoding.sampling_params import SamplingParams


def choose_one(params: SamplingParams, logits: torch.Tensor, read: torch.Tensor | None = None) -> int:
    """The token chosen from logits (1, v) after the prompt ``read``; -1 where there is none."""
    read = torch.zeros(0, dtype=torch.int64) if read is None else read.flatten()
    (token,) = Sampler().choose(logits, [SampledText(params, logits.shape[1], logits.device, read)])
    return token


class RaisingMatcher:
    """Allows everything, until it raises at the call of number ``at``, in the mask or when the token is taken."""

    def __init__(self, error: Exception, at: int, when: str):
        self.error, self.at, self.when, self.calls = error, at, when, 0

    def call(self, when: str) -> None:
        if when == self.when and self.calls >= self.at:
            raise self.error

    def accept(self, token: int) -> None:
        self.call("accept")
        self.calls += 1


class Raising(SamplingParams):
    """Parameters of a text whose constraint raises; `raising` makes them."""

    error: Exception
    at: int
    when: str

    def __repr__(self) -> str:
        return f"{super().__repr__()} that raises {self.error!r} at {self.when} {self.at}"

    def matcher(self):
        if self.when == "begin":
            raise self.error
        return RaisingMatcher(self.error, self.at, self.when)

    @staticmethod
    def mask(logits, matchers):
        for matcher in matchers:
            matcher.call("mask")
        return logits


def raising(error: Exception, at: int = 0, when: str = "mask", **values) -> Raising:
    params = Raising(**values)
    params.error, params.at, params.when = error, at, when
    return params
