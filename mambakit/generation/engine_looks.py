"""How many tokens an engine's slots write between two device-to-host syncs ("looks"), and when the host has them.

Where a look has several tokens, the next one is launched before those of the last are handled, so that the device does
not wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mambakit.decoding.loop import HostCopy, LogProbsBySlot, SlotLoop
from mambakit.decoding.parameters import Number
from mambakit.generation.request import Text

_MOST = 64  # a graph keeps no more tokens
# Without a number given: the time between two looks, and the most tokens. The host's part of a look, about 1 ms for
# 128 slots, is hidden behind the next one, and a newcomer waits no longer than for a prompt that is being read.
_SECONDS, _MOST_BY_TIME = 0.010, 8


@dataclass(frozen=True)
class Found:
    """The tokens of a look.

    Args:
        texts: per slot, its text when the look was launched. It may have ended since.
        tokens: per slot; those of a free slot are meaningless.
        log_probs: by slot, of those tokens, where the text asks for them.
    """

    texts: list[Text | None]
    tokens: Sequence[list[int]]
    log_probs: LogProbsBySlot


@dataclass(frozen=True)
class _Launched:
    """A look that the device works on."""

    texts: list[Text | None]
    tokens: HostCopy
    count: int
    at: float


class Looks:
    """Chooses the number of tokens of each look, and takes the looks.

    Args:
        loop: the slots.
        tokens: the number that was asked for; None: 1, and with a captured decoder as many as take 10 ms, up to 8.
        clock: gives the time in seconds.

    Raises:
        ValueError: a number below 1 or above 64.
    """

    def __init__(self, loop: SlotLoop, tokens: int | None, clock: Callable[[], float]):
        if tokens is not None:
            tokens = Number(1, 1, _MOST, whole=True).read("tokens_per_look", tokens)
        self._loop, self._tokens, self._clock = loop, tokens, clock
        self._step_seconds = 0.0  # a decaying mean
        self._launched: _Launched | None = None
        self._arrived = 0.0  # when the tokens of the last look were on the host

    def next(self) -> Found | None:
        """The tokens of a look, or None where the first of several was launched just now."""
        texts: list[Text | None] = list(self._loop.pool.occupants)
        writing = [text for text in texts if text is not None]
        ahead = 0 if self._launched is None else self._launched.count
        count = min(self._count(), max(text.most - len(text.written) for text in writing) - ahead)
        if self._count() == 1 or self._loop.must_look:
            return self.wait() if ahead else self._look(texts)
        launched = _Launched(texts, self._loop.launch(count), count, self._clock()) if count > 0 else None
        found = self.wait()
        self._launched = launched
        return found

    @property
    def several(self) -> bool:
        """Whether slots may read tokens beyond their texts' ends."""
        return self._launched is not None or self._count() > 1

    def wait(self) -> Found | None:
        """The tokens of the look that was launched, if one was. Afterwards the states are those after its tokens."""
        launched, self._launched = self._launched, None
        if launched is None:
            return None
        found = Found(launched.texts, *launched.tokens.wait())
        now = self._clock()
        self._note(now - max(launched.at, self._arrived), launched.count)
        self._arrived = now
        return found

    def forget(self) -> None:
        """Drop the look that was launched: all texts have ended."""
        self._launched = None

    def _look(self, texts: list[Text | None]) -> Found:
        began = self._clock()
        found = self._loop.look(1)
        self._note(self._clock() - began, 1)
        return Found(texts, found, self._loop.log_probs)

    def _count(self) -> int:
        if self._tokens is not None:
            return self._tokens
        if self._loop.pool.captured and self._step_seconds:
            return max(1, min(_MOST_BY_TIME, int(_SECONDS / self._step_seconds)))
        return 1

    def _note(self, seconds: float, count: int) -> None:
        seconds /= count
        self._step_seconds = seconds if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * seconds
