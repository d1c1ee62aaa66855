"""The texts that no replica has yet: their order, the room for them at the replicas, and how many may wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mambakit.generation.turns import Turns, within_share
from mambakit.serving.dispatch.jobs import Job, Replica

# Texts sent to a replica beyond its slots, so that a slot that becomes free is refilled without a round trip.
AHEAD = 2
# A request with no text at a replica may be sent beyond those, while its owner holds less than its share of this many
# times the slots: the engine there takes turns between owners, so the request gets its first token soon.
EARLY = 4
# The queue may grow to this many times its limit for owners that hold less than their share of it.
REACH = 2
_TRIES = 16  # requests whose next text is tried, in the order of their turns


class WaitingQueue:
    """One queue for all replicas, which have ``slots`` each. Texts of one owner leave in the order of arrival."""

    def __init__(self, slots: int):
        self._slots = slots
        self._jobs: dict[Job, None] = {}
        self._turns: Turns[Job] = Turns()  # the waiting texts and those at the replicas

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs[job] = None
        self._turns.add(job, job.share)

    def ended(self, job: Job) -> None:
        """It waits no more, and no replica has it."""
        self._jobs.pop(job, None)
        self._turns.remove(job)

    def served(self, job: Job, tokens: int) -> None:
        self._turns.serve(job, tokens)

    def take(self, replicas: Sequence[Replica]) -> tuple[Job, list[Replica]] | None:
        """The next text for which there is room, and the replicas that have room for it; None where there is none."""
        ready = [r for r in replicas if r.state == "ready"]
        placed = [job for r in replicas for job in r.jobs.values()]
        for job in self._turns.next(_TRIES, self._jobs.__contains__, placed, per_request=1):
            if able := [r for r in ready if self._has_room(r, job)]:
                del self._jobs[job]
                return job, able
        return None

    def _has_room(self, replica: Replica, job: Job) -> bool:
        placed = [other.share for other in replica.jobs.values()]
        if len(placed) < self._slots + AHEAD or within_share(job.share, placed, self._slots):
            return True
        return job.share not in placed and within_share(job.share, placed, EARLY * self._slots)

    def admits(self, jobs: Sequence[Job], replicas: Sequence[Replica], limit: int) -> bool:
        """Whether all texts of one request may wait.

        Where the queue is full with others' texts, a request for no more than its owner's share of the queue may.
        """
        waiting = [job.share for job in self._jobs]
        waiting += [job.share for r in replicas for job in list(r.jobs.values())[self._slots :]]
        free = sum(max(0, self._slots - len(r.jobs)) for r in replicas if r.state == "ready")
        count = len(jobs) - free
        if len(waiting) + count <= limit:
            return True
        return len(waiting) + count <= REACH * limit and within_share(jobs[0].share, waiting, limit, count)
