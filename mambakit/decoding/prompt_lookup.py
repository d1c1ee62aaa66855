"""Drafts from the text itself: what followed an earlier occurrence of its last tokens."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from mambakit.decoding.drafting import Draft, Scores
from mambakit.decoding.sampling_params import SamplingParams
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
