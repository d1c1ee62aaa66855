"""Texts that wait for a replica: whose turn it is, where there is room for them, and how many of whom may wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mambakit.generation.turns import Turns, within_share
from mambakit.serving.jobs import Job

if TYPE_CHECKING:
    from mambakit.serving.router import Replica

# Texts sent to a replica before a row is free, so that none stays empty while the next one is on its way.
AHEAD = 2
# A request of which no text is at a replica is sent beyond those, up to its share of so many times the rows: there it has its first
# token soon, and turns are taken for the rows.
EARLY = 4
# The queue grows up to so many times its limit for those who have less than their share of it.
REACH = 2
_TRIES = 16  # requests for whose next text room is sought, in the order of their turns


class Waiting:
    """The queue of all replicas, which have ``rows`` each. Texts with the same share are in the order in which they came."""

    def __init__(self, rows: int):
        self._rows = rows
        self._jobs: dict[Job, None] = {}
        self._turns: Turns[Job] = Turns()  # those, and the ones at the replicas

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs[job] = None
        self._turns.add(job, job.share)

    def ended(self, job: Job) -> None:
        """It waits no more, and is at no replica."""
        self._jobs.pop(job, None)
        self._turns.remove(job)

    def served(self, job: Job, tokens: int) -> None:
        self._turns.serve(job, tokens)

    def take(self, replicas: Sequence[Replica]) -> tuple[Job, list[Replica]] | None:
        """The text that is next of those for which there is room, and the replicas that have it."""
        ready = [r for r in replicas if r.state == "ready"]
        there = [job for r in replicas for job in r.jobs.values()]
        for job in self._turns.next(_TRIES, self._jobs.__contains__, there, per_request=1):
            if found := [r for r in ready if self._has_room(r, job)]:
                del self._jobs[job]
                return job, found
        return None

    def _has_room(self, replica: Replica, job: Job) -> bool:
        there = [other.share for other in replica.jobs.values()]
        if len(there) < self._rows + AHEAD or within_share(job.share, there, self._rows):
            return True
        return job.share not in there and within_share(job.share, there, EARLY * self._rows)

    def lets_in(self, jobs: Sequence[Job], replicas: Sequence[Replica], most: int) -> bool:
        """Whether all of one request's texts may wait. Where the queue is full with others', a request that asks for no more than
        its share of it may."""
        waiting = [job.share for job in self._jobs]
        waiting += [job.share for r in replicas for job in list(r.jobs.values())[self._rows :]]
        free = sum(max(0, self._rows - len(r.jobs)) for r in replicas if r.state == "ready")
        count = len(jobs) - free
        if len(waiting) + count <= most:
            return True
        return len(waiting) + count <= REACH * most and within_share(jobs[0].share, waiting, most, count)
