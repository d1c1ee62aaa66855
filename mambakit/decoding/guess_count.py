"""How many guesses a text's next draft should have: by how many of its last ones were accepted.

A round of k guesses costs a verification of k + 1 tokens and the draft model's steps, and gives 1 to k + 1 tokens.
`GuessCount` takes the k that gives the most tokens for its cost, and none where plain decoding is faster. Costs are
ratios to a plain step, fixed for a pair of models, and the acceptance is the text's own. So the number of guesses
depends on the text alone, not on clocks or on other texts, and a seed gives the same text again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

COUNTS = (1, 2, 3, 4, 5, 6, 8, 11, 15)  # that are tried, besides the largest: each is a graph of its own
# Of a plain step: a verification of one token, and each further one. On an H100, 1.4b: one row 1.33, 1.41, 1.47 for 3,
# 4 and 5 tokens; eight rows 1.18, 1.26, 1.33.
_VERIFICATION, _TOKEN = 1.10, 0.07
_EXPECTED = 0.8  # acceptance before anything was verified
_MEMORY = 0.85  # a decaying mean's: about 7 rounds
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256  # plain rounds before guesses are tried again
_AFTER_PAUSE = 0.6  # acceptance that is then assumed: two wrong drafts are enough for the next pause


class Guesses(NamedTuple):
    """What a round may do for a text."""

    most: int
    """The maximum number of guesses."""
    steps: int
    """Tokens that the draft model reads: ``most``, or one more, so that it has always read its last guess."""


NO_GUESSES = Guesses(0, 2)
"""2 steps, so that a draft model that is stepped for other texts has read all tokens of this one."""


class GuessCount:
    """The number of guesses of one text's drafts.

    The result for round n depends on rounds 0 to n - 2, whether or not n - 1 is known: rounds are launched ahead.

    Args:
        most: the maximum number, 0 to 15.
        step: the cost of a draft model's step, of a plain step; 0: guesses are free.
    """

    def __init__(self, most: int, step: float):
        self._most, self._step = most, step
        self._acceptance = _EXPECTED
        self._plain, self._pause = 0, _FIRST_PAUSE  # plain rounds left, and of the next pause
        self._launched = 0
        self._results: list[tuple[int, int]] = []  # of rounds that do not count yet
        self._counted = 0
        self._chosen: Guesses | None = None

    def next(self) -> Guesses:
        """For the next round; call it once a round."""
        while self._counted < self._launched - 1:
            self._count(*self._results.pop(0))
            self._counted += 1
        self._launched += 1
        if self._plain:
            self._plain -= 1
            if self._plain:
                return NO_GUESSES
            self._acceptance, self._chosen = _AFTER_PAUSE, None
        if self._chosen is None:
            self._chosen = best_guesses(self._most, self._step, round(_LEVELS * self._acceptance))
            if not self._chosen.most and self._most:
                self._plain, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return self._chosen

    def note(self, guesses: int, accepted: int) -> None:
        """The results of a round, in their order: ``accepted`` of its ``guesses`` were right."""
        self._results.append((guesses, accepted))

    def _count(self, guesses: int, accepted: int) -> None:
        if guesses:
            wrong = accepted < guesses
            share = accepted / (accepted + wrong)
            self._acceptance = _MEMORY * self._acceptance + (1 - _MEMORY) * share
            if not wrong:
                self._pause = _FIRST_PAUSE
            self._chosen = None


_LEVELS = 100  # to which an acceptance is rounded


@functools.cache
def best_guesses(most: int, step: float, level: int) -> Guesses:
    """The fastest number of guesses, up to ``most``, at an acceptance of ``level`` / 100; none where a plain step is
    faster. ``step`` is that of `GuessCount`."""
    a = min(level / _LEVELS, 0.99)
    tried = [k for k in COUNTS if k < most] + [most] * (most > 0)
    # One more step of the draft model costs nothing where guesses are free.
    options = [Guesses(k, n) for k in tried for n in sorted({max(2, k) if step else k + 1, k + 1})]
    best = max(options, key=lambda one: _speed(one, a, step), default=NO_GUESSES)
    return best if best.most and _speed(best, a, step) > 1 else NO_GUESSES


def _speed(one: Guesses, a: float, step: float) -> float:
    """Tokens of a round for its cost, at acceptance ``a``: of a plain round 1."""
    k = one.most
    cost = _VERIFICATION + _TOKEN * k + step * one.steps

    def tokens(guesses: int) -> float:
        return (1 - a ** (guesses + 1)) / (1 - a)

    if one.steps > k:
        return tokens(k) / cost
    # After a draft that was all right the draft model must read its last guess first, and makes one less.
    late = a**k / (1 + a**k - a ** (k - 1))
    return ((1 - late) * tokens(k) + late * tokens(k - 1)) / cost


def step_cost(model: object, draft: object) -> float:
    """The cost of a step of ``draft`` in steps of ``model``, both language models.

    By their bytes, and by their layers, as a small model waits for its layers more than for its weights. Measured for
    130m by 1.4b: 0.27 of a step of one row on an H200, 0.17 of one of 8 rows on an H100; this gives 0.17. At most 0.25:
    a larger draft model is meant to draft, too.
    """

    def size(one: object) -> tuple[int, int]:
        tensors = [*one.parameters(), *one.buffers()]  # type: ignore[attr-defined]
        return sum(t.nbytes for t in tensors), len(one.backbone.layers)  # type: ignore[attr-defined]

    (own, layers), (bytes_, few) = size(model), size(draft)
    return min(0.25, 0.5 * bytes_ / max(1, own) + 0.25 * few / max(1, layers))
