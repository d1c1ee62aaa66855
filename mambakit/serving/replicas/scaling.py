"""How many replicas run: more while texts wait, fewer when they have long been idle."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScalingOptions:
    """
    Attributes:
        least, most: replicas that run.
        texts: at each, running and waiting, above which another is started; a fraction of its slots.
        up_seconds, down_seconds: for which more are needed before one is started, or fewer before one is stopped.
    """

    least: int = 1
    most: int = 1
    texts: float = 1.0
    up_seconds: float = 5.0
    down_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"min_replicas is {self.least} and max_replicas is {self.most}; give 1 <= min <= max")


class Scaling:
    """The number of replicas that should run, from what they have to do."""

    def __init__(self, options: ScalingOptions, slots: int):
        self.options, self._slots = options, slots
        self._above: float | None = None
        self._below: float | None = None

    def wanted(self, running: int, texts: int, now: float) -> int:
        """
        Args:
            running: replicas now, those that are loading included.
            texts: that are being written or wait.
            now: seconds, by any clock that only rises.
        """
        options = self.options
        needed = math.ceil(texts / (options.texts * self._slots))
        needed = min(max(needed, options.least), options.most)
        self._above = None if needed <= running else now if self._above is None else self._above
        self._below = None if needed >= running else now if self._below is None else self._below
        if self._above is not None and now - self._above >= options.up_seconds:
            self._above = None
            return needed
        if self._below is not None and now - self._below >= options.down_seconds:
            self._below = None
            return running - 1  # one at a time: what it knows of prefixes is lost with it
        return max(running, options.least)
