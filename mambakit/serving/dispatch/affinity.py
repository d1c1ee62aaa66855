"""Which replica has what in memory: the states of prompts that begin alike, and states that were kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

_MOST = 200_000  # marks that are remembered
# Prompts are compared at so many positions in each doubling of their length, from the first position on.
_FIRST, _STEPS = 64, 4
_MISS = 4.0  # tokens that could be written while a state comes from the disk


def positions(tokens: int) -> list[int]:
    """Where prompts of so many tokens are compared: 64, 80, 96, 112, 128, 160, ... and their end."""
    found, step, at = [], _FIRST // _STEPS, _FIRST
    while at < tokens:
        found.append(at)
        at += step
        if at == 2 * _STEPS * step:
            step *= 2
    return [*found, tokens] if tokens >= _FIRST else found


def marks_of(ids: bytes, salt: str = "") -> list[tuple[int, bytes]]:
    """(position, hash of the tokens up to there) of a prompt of int64 ``ids``, the longest first."""
    digest, done, found = hashlib.blake2b(salt.encode(), digest_size=16), 0, []
    for position in positions(len(ids) // 8):
        digest.update(ids[8 * done : 8 * position])
        done = position
        found.append((position, digest.digest()))
    return found[::-1]


class Affinity:
    """By mark, the replica that had it last. A replica that dies knows nothing any more."""

    def __init__(self) -> None:
        self._replicas: OrderedDict[bytes | str, int] = OrderedDict()

    def note(self, marks: list[tuple[int, bytes]], states: tuple[str, ...], replica: int) -> None:
        """A replica reads a prompt, or has these states."""
        new: list[bytes | str] = [*(mark for _, mark in marks), *states]
        for mark in new:
            self._replicas[mark] = replica
            self._replicas.move_to_end(mark)
        while len(self._replicas) > _MOST:
            self._replicas.popitem(last=False)

    def lost(self, replica: int) -> None:
        for mark in [mark for mark, number in self._replicas.items() if number == replica]:
            del self._replicas[mark]

    def known(self, marks: list[tuple[int, bytes]]) -> dict[int, int]:
        """replica -> how many tokens of a prompt it has read, for those that know any."""
        found: dict[int, int] = {}
        for position, mark in marks:
            replica = self._replicas.get(mark)
            if replica is not None:
                found.setdefault(replica, position)
        return found

    def cost_of_state(self, state: str, replica: int) -> float:
        """In tokens: 0 where the replica has the state in memory."""
        return 0.0 if not state or self._replicas.get(state) == replica else _MISS
