"""How fast texts end, and so when a text that is refused now would be accepted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

_SECONDS, _MOST = 60.0, 256  # what is measured: the last minute, at most so many texts
_ENOUGH = 8  # texts that have ended, for their rate to say more than the tokens do
# Of the room that becomes free, this part is for clients who were told to return; newcomers of owners that have less
# than their share take the rest.
_FOR_RETURNING = 0.75
_LONGEST = 3600  # seconds that a client is told to wait, at most


class Rates:
    """Measured on the texts that end.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._ended: deque[float] = deque(maxlen=_MOST)
        self._work: deque[tuple[float, float]] = deque(maxlen=4 * _MOST)  # (when, tokens)
        self._mean = 0.0  # tokens of a text, a decaying mean

    def idle(self) -> None:
        """Nothing is left to do: what follows is not slow because nobody asked for it."""
        self._ended.clear()
        self._work.clear()

    def served(self, work: float) -> None:
        """So many tokens were written (or read, at their cost)."""
        self._work.append((self._clock(), work))

    def ended(self, work: float) -> None:
        """A text has ended, after so many tokens in all."""
        self._ended.append(self._clock())
        self._mean = work if not self._mean else 0.95 * self._mean + 0.05 * work

    def texts_per_second(self, expected_work: float) -> float | None:
        """How many texts end; None where nothing was measured.

        Args:
            expected_work: tokens of a text, where too few have ended to know.
        """
        now = self._clock()
        while self._ended and now - self._ended[0] > _SECONDS:
            self._ended.popleft()
        while self._work and now - self._work[0][0] > _SECONDS:
            self._work.popleft()
        if len(self._ended) >= _ENOUGH and now > self._ended[0]:
            return (len(self._ended) - 1) / (now - self._ended[0])
        if len(self._work) > 1 and now > self._work[0][0]:
            tokens = sum(work for _, work in list(self._work)[1:]) / (now - self._work[0][0])
            return tokens / max(1.0, self._mean or expected_work)
        return None

    def seconds_until(self, texts: int, expected_work: float) -> int:
        """Whole seconds, 1 or more, until so many texts have ended."""
        rate = self.texts_per_second(expected_work)
        return min(_LONGEST, max(1, math.ceil(texts / (_FOR_RETURNING * rate)))) if rate else 1
