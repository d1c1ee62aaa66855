"""How many tokens an engine's slots write between two device-to-host syncs ("looks")."""

from __future__ import annotations

from collections.abc import Callable

from mambakit.decoding.parameters import Number
from mambakit.decoding.slots import SlotPool
from mambakit.generation.request import Text

_MOST = 64  # a graph keeps no more tokens
# Without a number given: the time between two looks, and the most tokens. The host's part of a look, about 0.25 ms for
# 128 slots, is then a few percent of it, and a newcomer waits no longer than for a prompt that is being read.
_SECONDS, _MOST_BY_TIME = 0.010, 8


class Looks:
    """Chooses the number of tokens of each look.

    Args:
        tokens: the number that was asked for; None: 1, and with a captured decoder as many as take 10 ms, up to 8.
        clock: gives the time in seconds.

    Raises:
        ValueError: a number below 1 or above 64.
    """

    def __init__(self, tokens: int | None, clock: Callable[[], float]):
        if tokens is not None:
            tokens = Number(1, 1, _MOST, whole=True).read("tokens_per_look", tokens)
        self.tokens, self._clock = tokens, clock
        self._step_seconds = 0.0  # a decaying mean

    def count(self, pool: SlotPool, texts: list[Text]) -> int:
        """The number of tokens of the next look, at which ``texts`` have a slot."""
        count = self.tokens
        if count is None:
            count = 1
            if pool.captured and self._step_seconds:
                count = max(1, min(_MOST_BY_TIME, int(_SECONDS / self._step_seconds)))
        return min(count, max(text.most - len(text.written) for text in texts))

    def timed(self, look: Callable[[int], list[list[int]]], count: int) -> list[list[int]]:
        """The result of ``look(count)``, whose time decides about later ones."""
        began = self._clock()
        found = look(count)
        seconds = (self._clock() - began) / max(1, len(found[0]))
        self._step_seconds = seconds if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * seconds
        return found
