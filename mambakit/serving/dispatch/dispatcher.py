"""Sends texts to replicas and delivers what they generate.

Texts wait in one queue and not at the replicas: each is sent to the replica with the least remaining work when one has
room. Keys, their clients and their requests take turns, and every request soon has a text at a replica, whose engine
takes turns for its slots. All methods run on the event loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from mambakit.serving.dispatch.jobs import Job, Replica
from mambakit.serving.dispatch.queue import WaitingQueue
from mambakit.serving.dispatch.suspects import Suspects
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Cancel, Piece, Task
from mambakit.serving.metrics import Metrics

_log = logging.getLogger("mambakit.serving")


class Dispatcher:
    """Replicas behind one queue.

    Args:
        devices: one for each replica.
        slots: of each replica.
        max_waiting: texts that may wait for a slot; up to twice as many where new owners have less than their share.
        metrics: where texts, tokens and times are counted.
    """

    def __init__(self, devices: Sequence[str], *, slots: int, max_waiting: int, metrics: Metrics):
        self.slots, self.max_waiting, self.metrics = slots, max_waiting, metrics
        self.replicas = [Replica(number, device) for number, device in enumerate(devices)]
        self._suspects = Suspects()
        self._queue = WaitingQueue(slots)

    # -- requests

    @property
    def waiting(self) -> int:
        """Texts without a slot."""
        return len(self._queue) + sum(max(0, len(r.jobs) - self.slots) for r in self.replicas)

    def require_ready(self) -> None:
        """Raises an `ApiError` where no replica is ready."""
        if not any(r.state == "ready" for r in self.replicas):
            states = "; ".join(f"{r.name}: {r.state}{f', {r.error}' if r.error else ''}" for r in self.replicas)
            raise ApiError(503, f"no replica is ready ({states}); try again in a few seconds", retry_after=5)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these texts, or none.

        Raises:
            ApiError: too many wait already, no replica is ready, or replicas have died of such a text.
        """
        self._suspects.refuse(jobs)
        self.require_ready()
        if jobs and not self._queue.admits(jobs, self.replicas, self.max_waiting):
            message = (
                f"{self.waiting} texts wait already, and {len(jobs)} more are too many; at most {self.max_waiting} may "
                "(--max-waiting): try again later"
            )
            raise ApiError(429, message, retry_after=1)
        for job in jobs:
            self._queue.add(job)
        self.dispatch()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End these texts, whose client is gone; those that have ended already are left alone."""
        for job in jobs:
            if job.ended:
                continue
            job.ended = True
            if job.replica is None:
                self._queue.ended(job)
                self.metrics.ended("", "cancelled")
            else:
                job.replica.outgoing.put(Cancel(job.id))

    def fail_all(self, reason: str) -> None:
        """End every text with an error."""
        for job in [*self._queue, *(job for r in self.replicas for job in r.jobs.values())]:
            replica = job.replica
            if not job.ended:
                self._fail(job, ApiError(503, reason, retry_after=1))
                if replica is not None:
                    replica.outgoing.put(Cancel(job.id))
        for job in list(self._queue):
            self._queue.ended(job)

    def dispatch(self) -> None:
        """Send waiting texts to the replicas that have room, the one with the least remaining work first."""
        while found := self._queue.take(self.replicas):
            job, able = found
            replica = min(
                able,
                key=lambda r: (len(r.jobs) >= self.slots, sum(job.remaining for job in r.jobs.values()), r.number),
            )
            job.replica, replica.jobs[job.id] = replica, job
            replica.outgoing.put(
                Task(job.id, job.prompt_ids, job.sampling, job.max_new_tokens, job.stop, job.share, job.options)
            )

    # -- events of replicas

    def ready(self, replica: Replica) -> None:
        """It takes texts."""
        replica.state = "ready"
        self.dispatch()

    def receive(self, replica: Replica, batch: Batch) -> None:
        """Deliver a replica's output to the inboxes."""
        replica.busy, replica.waiting = batch.busy, batch.waiting
        for piece in batch.pieces:
            self._deliver(replica, piece)
        if any(piece.finish_reason for piece in batch.pieces):  # else there is no more room than before
            self.dispatch()

    def lost(self, replica: Replica, reason: str) -> None:
        """Its process died: its texts end with errors; those that wait go to other replicas."""
        replica.state, replica.error = "dead", reason
        replica.busy = replica.waiting = 0
        jobs, replica.jobs = list(replica.jobs.values()), {}
        suspected = self._suspects.died(jobs)
        for job in jobs:
            self._queue.ended(job)
            if not job.ended:
                message = f"{replica.name} died while it wrote this text ({reason}); send the request again"
                self._fail(job, suspected.get(job.id) or ApiError(503, message, retry_after=1))

    def _deliver(self, replica: Replica, piece: Piece) -> None:
        job = replica.jobs[piece.id]
        name = str(replica.number)
        now = time.monotonic()
        if piece.tokens:
            if not job.tokens:
                job.first = now
                self.metrics.first.labels(name).observe(now - job.created)
            job.tokens += piece.tokens
            self._queue.served(job, piece.tokens)
            self.metrics.tokens.labels(name).inc(piece.tokens)
        if piece.finish_reason:
            del replica.jobs[job.id]
            self._queue.ended(job)
        if piece.error and not job.ended:
            if piece.text:
                job.inbox.put(job.index, piece._replace(finish_reason="", error=""))
            _log.error("%s failed on a text of %d prompt tokens: %s", replica.name, job.prompt_tokens, piece.error)
            message = f"text {job.index} of this request could not be written: {piece.error}"
            self._fail(job, ApiError(piece.status, message))
            return
        if not job.ended:
            job.inbox.put(job.index, piece)
        if piece.finish_reason:
            outcome = "cancelled" if job.ended else piece.finish_reason
            job.ended = True
            each = (now - job.first) / (job.tokens - 1) if job.tokens > 1 else None
            read = (0, 0) if job.copy else (job.prompt_tokens, piece.cached_tokens)  # each prompt counts once
            self.metrics.ended(name, outcome, *read, each)

    def _fail(self, job: Job, error: ApiError) -> None:
        self.metrics.ended("" if job.replica is None else str(job.replica.number), "failed")
        job.ended = True
        job.inbox.fail(error)

    # -- monitoring

    def health(self) -> dict[str, Any]:
        """ "ok" where every replica is ready, "degraded" where some are, else "loading" or "unavailable"."""
        states = {r.state for r in self.replicas}
        status = "degraded" if "ready" in states else "loading" if "loading" in states else "unavailable"
        return {
            "status": "ok" if states == {"ready"} else status,
            "waiting": self.waiting,
            "replicas": [
                {
                    "replica": r.number, "device": r.device, "state": r.state, "pid": r.pid,
                    "slots": self.slots, "rows": self.slots,  # its name until 2026-11
                    "busy": r.busy, "waiting": max(r.waiting, len(r.jobs) - self.slots),
                    "restarts": r.restarts, "error": r.error,
                }
                for r in self.replicas
            ],
        }  # fmt: skip

    def measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.waiting.set(self.waiting)
        for replica in self.replicas:
            self.metrics.busy.labels(str(replica.number)).set(replica.busy)
            self.metrics.up.labels(str(replica.number)).set(replica.state == "ready")
