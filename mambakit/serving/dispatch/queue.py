"""The texts that no replica has yet: their order, the room for them at the replicas, and how many may wait."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Generator, Hashable, Iterator, Sequence

from mambakit.generation.turns import texts_ahead
from mambakit.serving.dispatch.fair_queue import FairQueue
from mambakit.serving.dispatch.jobs import Job, Replica
from mambakit.serving.dispatch.shares import Shares

# A request with no text at a replica that is full may be sent to it, while its owner holds less than its share of this
# many times the slots: the engine there takes turns between owners, so the request gets its first token soon.
EARLY = 4
# The queue may grow to this many times its limit for owners that hold less than their share of it.
REACH = 2
_TRIES = 8  # requests whose next text is tried, in the order of their turns


class WaitingQueue:
    """One queue for all replicas, which have ``slots`` each. Texts of one request leave in the order of arrival.

    A replica is full with as many texts beyond its slots as its engine reads ahead. It gets no more of one request:
    what was sent is neither overtaken by a text of higher priority nor given to another replica.
    """

    def __init__(self, slots: int):
        self._slots, self._full = slots, slots + texts_ahead(slots)
        self._texts = FairQueue()  # the waiting texts and those at the replicas
        self._shares = Shares()  # of the same
        self._deadlines: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._texts)

    def add(self, job: Job) -> None:
        self._texts.add(job)
        self._shares.add(job.share)
        if job.deadline < math.inf:
            heapq.heappush(self._deadlines, (job.deadline, next(self._numbers), job))

    def ended(self, job: Job) -> None:
        """It waits no more, and no replica has it."""
        self._texts.remove(job)
        self._shares.remove(job.share)

    def served(self, job: Job, work: float) -> None:
        self._texts.serve(job, work)

    def expired(self, now: float) -> list[Job]:
        """Texts whose deadline has passed and that have not ended, each once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            if not job.ended:
                found.append(job)
        return found

    def take(self, replicas: Sequence[Replica], newcomers: Sequence[Job] = ()) -> tuple[Job, list[Replica]] | None:
        """The next text for which there is room, and the replicas that have room for it; None where there is none.

        Args:
            newcomers: the texts that have come since there was no room for any other.
        """
        ready = [r for r in replicas if r.state == "ready" and len(r.jobs) < self._most]
        if not ready:
            return None
        free = any(len(r.jobs) < self._full for r in ready)
        turns: Generator[Job, None, None] = self._texts.next()
        if newcomers and not free:
            turns = (job for job in newcomers if job in self._texts)
        with contextlib.closing(turns):
            found = next(
                (
                    (job, able)
                    for job in itertools.islice(turns, _TRIES)
                    if (able := [r for r in ready if self._has_room(r, job)])
                ),
                None,
            )
        if found is not None:
            self._texts.start(found[0])
        return found

    @property
    def _most(self) -> float:
        """No replica has room for more than so many texts: the logarithm of a million owners, see `Shares.fits`."""
        return EARLY * self._slots * 14 + texts_ahead(self._slots)

    def _has_room(self, replica: Replica, job: Job) -> bool:
        shares = replica.shares
        if len(shares) < self._full or shares.fits(job.share, self._slots):
            return True
        return job.share not in shares and shares.fits(job.share, EARLY * self._slots)

    def over(self, count: int, replicas: Sequence[Replica], limit: int) -> int:
        """How many texts must end before ``count`` more may wait; 0 or less where they may wait now."""
        beyond = sum(max(0, len(r.jobs) - self._slots) for r in replicas)
        free = sum(max(0, self._slots - len(r.jobs)) for r in replicas if r.state == "ready")
        return len(self) + beyond + count - free - limit

    def admits(self, jobs: Sequence[Job], replicas: Sequence[Replica], limit: int, kept: int | None = 0) -> bool:
        """Whether all texts of one request may wait.

        Where the queue is full with others' texts, a request for no more than its owner's share of the queue may.

        Args:
            kept: texts for which room is kept; None where these are such texts themselves.
        """
        over = self.over(len(jobs), replicas, limit)
        if kept is not None and over + kept <= 0:
            return True
        beyond = over + limit <= REACH * limit
        return beyond and (kept is None or self._shares.fits(jobs[0].share, limit, len(jobs)))

    def by_key(self) -> dict[Hashable, int]:
        """How many texts of each key wait."""
        return self._texts.by_key()
