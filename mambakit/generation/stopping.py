"""Stop strings, found while a text is generated, in time linear in the text."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

from mambakit.quoting import quoted


def read_stops(value: Any) -> tuple[str, ...]:
    """``value``, a string or strings, as a tuple.

    Raises:
        TypeError: something else.
        ValueError: an empty string.
    """
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple, set, frozenset)) or not all(isinstance(s, str) for s in stops):
        raise TypeError(f"stop is {quoted(value)}; give a string or a list of strings")
    if not all(stops):
        raise ValueError("a stop string is empty; every text would end at once")
    return tuple(stops)


class StopSearch:
    """Holds back the end of a text while it may begin a stop string, and cuts the text before the first one.

    One Knuth-Morris-Pratt search for each string, so that each character is read once.

    Attributes:
        stopped: whether a stop string has been found; nothing may be pushed afterwards.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stopped = False
        self._stops = [(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._matched = [0] * len(self._stops)  # length of the longest prefix of each that the text ends with
        self._held: deque[str] = deque()
        self._length = 0  # of the text that is held back

    def push(self, piece: str) -> str:
        """Append ``piece`` to the text; returns what can be shown now."""
        starts = []
        for i, (stop, borders) in enumerate(self._stops):
            self._matched[i], end = _advance(stop, borders, self._matched[i], piece)
            if end:
                starts.append(self._length + end - len(stop))
        if piece:
            self._held.append(piece)
            self._length += len(piece)
        self.stopped = bool(starts)
        return self._take(min(starts) if starts else self._length - max(self._matched, default=0))

    def rest(self) -> str:
        """The text that was held back, at its end; empty after a stop string."""
        return "" if self.stopped else self._take(self._length)

    def _take(self, count: int) -> str:
        """Take the first ``count`` characters that are held back."""
        self._length -= count
        taken = []
        while count:
            part = self._held.popleft()
            if len(part) > count:
                self._held.appendleft(part[count:])
                part = part[:count]
            taken.append(part)
            count -= len(part)
        return "".join(taken)


def _advance(stop: str, borders: list[int], matched: int, piece: str) -> tuple[int, int]:
    """(characters of ``stop`` matched after ``piece``, where in ``piece`` the first whole match ends or 0)."""
    at = 0
    while at < len(piece):
        if not matched:
            at = piece.find(stop[0], at)
            if at < 0:
                return 0, 0
        while matched and stop[matched] != piece[at]:
            matched = borders[matched - 1]
        matched += stop[matched] == piece[at]
        at += 1
        if matched == len(stop):
            return matched, at
    return matched, 0


@functools.lru_cache(maxsize=64)
def _borders(stop: str) -> list[int]:
    """For each prefix of ``stop``, the length of its longest proper suffix that is a prefix (the failure function)."""
    borders, length = [0], 0
    for letter in stop[1:]:
        while length and letter != stop[length]:
            length = borders[length - 1]
        length += letter == stop[length]
        borders.append(length)
    return borders
