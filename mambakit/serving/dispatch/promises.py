"""Clients who were told when to return: room is kept for them then, so that what they were told is true."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

_EARLY, _LATE = 1.0, 2.0  # seconds around the time that was told, in which room is kept


@dataclass
class _Promise:
    due: float
    owner: Hashable
    texts: int
    open: bool = True


class Promises:
    """Texts that were refused, and when they may return."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._coming: list[tuple[float, int, _Promise]] = []  # a heap
        self._due: deque[_Promise] = deque()
        self._by_owner: dict[Hashable, deque[_Promise]] = {}
        self.outstanding = 0
        """Texts that are expected to return."""
        self._reserved = 0

    def add(self, owner: Hashable, due: float, texts: int) -> None:
        promise = _Promise(due, owner, texts)
        heapq.heappush(self._coming, (due, next(self._numbers), promise))
        self._by_owner.setdefault(owner, deque()).append(promise)
        self.outstanding += texts

    def reserved(self, now: float) -> int:
        """Texts for which room is kept now."""
        while self._coming and self._coming[0][0] <= now + _EARLY:
            promise = heapq.heappop(self._coming)[2]
            if promise.open:
                self._due.append(promise)
                self._reserved += promise.texts
        while self._due and self._due[0].due < now - _LATE:
            promise = self._due.popleft()
            if promise.open:
                self._reserved -= promise.texts
                self._close(promise)
        return self._reserved

    def claim(self, owner: Hashable, now: float) -> bool:
        """Whether room is kept for a text of this owner; it is kept no longer."""
        self.reserved(now)
        promises = self._by_owner.get(owner, ())
        found = next((one for one in promises if one.open and one.due <= now + _EARLY), None)
        if found is None:
            return False
        self._reserved -= found.texts
        self._close(found)
        return True

    def _close(self, promise: _Promise) -> None:
        promise.open = False
        self.outstanding -= promise.texts
        promises = self._by_owner[promise.owner]
        promises.remove(promise)
        if not promises:
            del self._by_owner[promise.owner]
