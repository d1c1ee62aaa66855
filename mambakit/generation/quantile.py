"""A running quantile: of the latest values of a series, exact."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable

from mambakit.errors import UsageError


class RunningQuantile:
    """The quantile of the latest ``window`` values.

    Args:
        quantile: between 0 and 1.
        window: how many values count; each costs 16 bytes.
        least: values before there is a quantile; None: enough that one of them is expected above it.
        values: to begin with, oldest first.

    Raises:
        UsageError: a quantile outside of 0 to 1, or a window that never holds enough values.
    """

    def __init__(self, quantile: float, window: int = 10_000, least: int | None = None, values: Iterable[float] = ()):
        if not 0 < quantile < 1:
            raise UsageError(f"the quantile is {quantile}; it must be between 0 and 1")
        self.quantile, self.window = quantile, window
        self.least = math.ceil(round(1 / (1 - quantile), 6)) if least is None else least
        if self.least > window:
            raise UsageError(
                f"a quantile of {quantile} needs {self.least} values, and the window holds {window}; widen the window"
            )
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"a value of {value} has no place among others; leave it out")
        if len(self._latest) == self.window:
            del self._sorted[bisect.bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(value)
        bisect.insort(self._sorted, value)

    @property
    def value(self) -> float | None:
        """The quantile, between the two values next to it by linear interpolation; None before ``least`` values."""
        count = len(self._sorted)
        if count < self.least:
            return None
        place = self.quantile * (count - 1)
        low = math.floor(place)
        high = min(low + 1, count - 1)
        return self._sorted[low] + (place - low) * (self._sorted[high] - self._sorted[low])

    @property
    def values(self) -> list[float]:
        """Those that count, oldest first."""
        return list(self._latest)
