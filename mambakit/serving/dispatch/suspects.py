"""Texts that may kill replicas are refused: a client that retries must not take down one replica after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from mambakit.serving.dispatch.jobs import Job
from mambakit.serving.errors import ApiError

# One death may have any cause. When the same work is sent again and a replica dies again, the work is refused.
DEATHS, SECONDS = 2, 600.0
_MOST = 10_000


class Suspects:
    """The texts that replicas had when they died, for some minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[int, tuple[int, float]] = {}  # by `Job.work`: how many, and when the last was

    def died(self, jobs: Sequence[Job]) -> dict[int, ApiError]:
        """A replica died with these texts. Returns, by `Job.id`, the errors of those that must not be sent again."""
        now = self._clock()
        self._deaths = {work: known for work, known in self._deaths.items() if now - known[1] < SECONDS}
        created: dict[int, float] = {}
        for job in jobs:
            created[job.work] = max(job.created, created.get(job.work, 0.0))
        for work, last in created.items():
            deaths, when = self._deaths.pop(work, (0, 0.0))
            # A text that was running at the last death, too, was not sent again after it.
            self._deaths[work] = (deaths + 1, now) if last > when else (deaths, when)
        for work in list(self._deaths)[:-_MOST]:
            del self._deaths[work]
        return {job.id: self._answer(job) for job in jobs if self._deaths[job.work][0] >= DEATHS}

    def refuse(self, jobs: Iterable[Job]) -> None:
        """Raises an `ApiError` where replicas have died of such a text."""
        if not self._deaths:
            return
        now = self._clock()
        for job in jobs:
            deaths, when = self._deaths.get(job.work, (0, 0.0))
            if deaths >= DEATHS and now - when < SECONDS:
                raise self._answer(job)

    def _answer(self, job: Job) -> ApiError:
        deaths, _ = self._deaths[job.work]
        return ApiError(
            500,
            f"{deaths} replicas have died while they wrote this text, which may be the cause; do not send it again: it "
            f"is refused for {SECONDS / 60:.0f} minutes. The server's log says how they died",
        )
