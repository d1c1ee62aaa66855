"""Sends texts to replicas and delivers what they generate.

Texts wait in one queue and not at the replicas: each is sent when a replica has room, to the one that will have done it
first: by what it has left to write, and by what it knows of the prompt. Keys, their clients and their requests take
turns, and every request soon has a text at a replica, whose engine takes turns for its slots. All methods run on the
event loop's thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mambakit.serving.dispatch.affinity import Affinity, marks_of
from mambakit.serving.dispatch.jobs import PROMPT_COST, Job, Replica
from mambakit.serving.dispatch.promises import Promises
from mambakit.serving.dispatch.queue import WaitingQueue
from mambakit.serving.dispatch.rates import Rates
from mambakit.serving.dispatch.suspects import Suspects
from mambakit.serving.errors import ApiError
from mambakit.serving.logs import fields
from mambakit.serving.messages import Batch, Cancel, Layout, Piece, Task
from mambakit.serving.metrics import Metrics

_log = logging.getLogger("mambakit.serving")

_LOADING = 5  # seconds that a client is told to wait for a replica whose start has never been measured


class Dispatcher:
    """Replicas behind one queue.

    Args:
        devices: one for each replica.
        slots: of each replica.
        max_waiting: texts that may wait for a slot; up to twice as many where new owners have less than their share.
        metrics: where texts, tokens and times are counted.
        caching: whether the replicas have a prefix cache, so that a prompt is read faster where its beginning was.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        slots: int,
        max_waiting: int,
        metrics: Metrics,
        caching: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.slots, self.max_waiting, self.metrics, self.clock = slots, max_waiting, metrics, clock
        self.replicas = [Replica(number, device) for number, device in enumerate(devices)]
        self.layout: Layout | None = None
        """What a state of the replicas' model is, as soon as one has said so."""
        self._caching = caching and len(devices) > 1
        self._suspects = Suspects(clock)
        self._queue = WaitingQueue(slots)
        self._affinity = Affinity()
        self._rates, self._promises = Rates(clock), Promises()

    # -- requests

    @property
    def waiting(self) -> int:
        """Texts without a slot."""
        return len(self._queue) + sum(max(0, len(r.jobs) - self.slots) for r in self.replicas)

    def require_ready(self) -> None:
        """Raises an `ApiError` where no replica is ready."""
        if not any(r.state == "ready" for r in self.replicas):
            states = "; ".join(f"{r.name}: {r.state}{f', {r.error}' if r.error else ''}" for r in self.replicas)
            seconds = self._seconds_to_ready()
            raise ApiError(503, f"no replica is ready ({states}); try again in {seconds} s", retry_after=seconds)

    def _seconds_to_ready(self) -> int:
        """Until the first replica is ready, by how long its last start took."""
        now = self.clock()
        left = [r.began + r.load_seconds - now for r in self.replicas if r.load_seconds is not None]
        return max(1, math.ceil(min(left))) if left else _LOADING

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these texts, or none.

        Raises:
            ApiError: too many wait already, no replica is ready, or replicas have died of such a text.
        """
        self._suspects.refuse(jobs)
        self.require_ready()
        if jobs:
            self._admit(jobs)
        for job in jobs:
            job.created = self.clock()
            self._queue.add(job)
        if jobs:
            self.dispatch(jobs)

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Raises an `ApiError` where too many texts wait. It says when so many have ended that these may wait."""
        now, owner, count = self.clock(), jobs[0].share[:2], len(jobs)
        kept = None if self._promises.claim(owner, now) else self._promises.reserved(now)
        if self._queue.admits(jobs, self.replicas, self.max_waiting, kept):
            return
        over = self._queue.over(count, self.replicas, self.max_waiting) + self._promises.outstanding
        work = sum(r.work for r in self.replicas) / max(1, sum(len(r.jobs) for r in self.replicas))
        seconds = self._rates.seconds_until(over, work)
        self._promises.add(owner, now + seconds, count)
        message = (
            f"{self.waiting} texts wait already, and {count} more are too many; at most {self.max_waiting} may "
            f"(--max-waiting): try again in {seconds} s, when enough will have been written"
        )
        raise ApiError(429, message, retry_after=seconds)

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

    def dispatch(self, newcomers: Sequence[Job] = ()) -> None:
        """Send waiting texts to the replicas that have room, each to the one that will have done it first.

        Args:
            newcomers: the texts of a request, where nothing else has changed since the last call.
        """
        while found := self._queue.take(self.replicas, newcomers):
            job, able = found
            if job.deadline <= self.clock():
                self._expire(job)
                self._queue.ended(job)
                continue
            start = job.options.state.start if job.options.state else ""
            marks = marks_of(job.prompt_ids, job.options.cache_salt) if self._caching and not start else []
            replica = self._choose(job, able, start, self._affinity.known(marks)) if len(able) > 1 else able[0]
            replica.add(job)
            self._affinity.note(marks, (start,) if start else (), replica.number)
            replica.outgoing.put(
                Task(job.id, job.prompt_ids, job.sampling, job.max_new_tokens, job.stop, job.share, job.options)
            )

    def _choose(self, job: Job, able: list[Replica], start: str, known: dict[int, int]) -> Replica:
        """A replica with a free slot before one without; then the one with the least to do, what of the prompt it must
        read included."""

        def cost(replica: Replica) -> tuple[bool, float, int]:
            unread = job.prompt_tokens - known.get(replica.number, 0)
            work = replica.work + unread * PROMPT_COST + self._affinity.cost_of_state(start, replica.number)
            return len(replica.jobs) >= self.slots, work, replica.number

        return min(able, key=cost)

    def expire(self) -> None:
        """End the texts whose deadline has passed. Call it several times a second."""
        for job in self._queue.expired(self.clock()):
            replica = job.replica
            self._expire(job)
            if replica is None:
                self._queue.ended(job)
            else:
                replica.outgoing.put(Cancel(job.id))

    def _expire(self, job: Job) -> None:
        where = "it was being written" if job.tokens else "it had not begun"
        message = f"the text was not done by its deadline, {job.deadline - job.created:.3g} s after it was asked for"
        self._fail(job, ApiError(504, f"{message}: {where}; ask for fewer tokens, or later", code="deadline_exceeded"))

    # -- events of replicas

    def ready(self, replica: Replica) -> None:
        """It takes texts."""
        if replica.state == "loading":
            replica.load_seconds = self.clock() - replica.began
        replica.state = "ready"
        self.dispatch()

    def receive(self, replica: Replica, batch: Batch) -> None:
        """Deliver a replica's output to the inboxes."""
        replica.busy, replica.waiting = batch.busy, batch.waiting
        now, work = self.clock(), 0.0
        for piece in batch.pieces:
            if piece.tokens:
                job = replica.jobs[piece.id]
                if not job.tokens:
                    job.first = now
                    self.metrics.first.labels(str(replica.number)).observe(now - job.created)
                self._queue.served(job, done := replica.wrote(job, piece.tokens))
                work += done
        if work:  # once for all pieces: to look up a label takes as long as the rest
            self.metrics.tokens.labels(str(replica.number)).inc(sum(piece.tokens for piece in batch.pieces))
            self._rates.served(work)
        for piece in batch.pieces:
            self._deliver(replica, piece, now)
        if any(piece.finish_reason for piece in batch.pieces):  # else there is no more room than before
            self.dispatch()

    def lost(self, replica: Replica, reason: str) -> None:
        """Its process died: its texts end with errors; those that wait go to other replicas."""
        replica.state, replica.error = "dead", reason
        replica.busy = replica.waiting = 0
        self._affinity.lost(replica.number)
        jobs = list(replica.jobs.values())
        for job in jobs:
            replica.remove(job)
        suspected = self._suspects.died(jobs)
        if jobs:
            lost = {"replica": replica.number, "request_ids": sorted({job.request_id for job in jobs})}
            _log.error("texts were lost with their replica", extra=fields(**lost))
        for job in jobs:
            self._queue.ended(job)
            if not job.ended:
                message = f"{replica.name} died while it wrote this text ({reason}); send the request again"
                self._fail(job, suspected.get(job.id) or ApiError(503, message, retry_after=1))

    def _deliver(self, replica: Replica, piece: Piece, now: float) -> None:
        job = replica.jobs[piece.id]
        if piece.finish_reason:
            replica.remove(job)
            self._queue.ended(job)
            self._rates.ended(job.tokens + job.prompt_tokens * PROMPT_COST)
            if not len(self._queue) and not any(r.jobs for r in self.replicas):
                self._rates.idle()
            if piece.kept is not None:
                self._affinity.note([], (piece.kept.blob,), replica.number)
        if piece.error and not job.ended:
            if piece.text:
                job.inbox.put(job.index, piece._replace(finish_reason="", error=""))
            # What is wrong with a request is told to its client; the message may quote it.
            why = piece.error if piece.status >= 500 else f"the request is at fault ({piece.status})"
            known = fields(request_id=job.request_id, replica=replica.number, prompt_tokens=job.prompt_tokens)
            _log.log(logging.ERROR if piece.status >= 500 else logging.INFO, "a text failed: %s", why, extra=known)
            message = f"text {job.index} of this request could not be written: {piece.error}"
            self._fail(job, ApiError(piece.status, message, code=piece.code or None))
            return
        if not job.ended:
            job.inbox.put(job.index, piece)
        if piece.finish_reason:
            outcome = "cancelled" if job.ended else piece.finish_reason
            job.ended = True
            each = (now - job.first) / (job.tokens - 1) if job.tokens > 1 else None
            read = (0, 0) if job.copy else (job.prompt_tokens, piece.cached_tokens)  # each prompt counts once
            self.metrics.ended(str(replica.number), outcome, *read, each)

    def _fail(self, job: Job, error: ApiError) -> None:
        self.metrics.ended("" if job.replica is None else str(job.replica.number), "failed")
        job.ended = True
        job.inbox.fail(error)

    # -- monitoring

    def waiting_by_key(self) -> dict[Hashable, int]:
        """Texts that no replica has yet, by key."""
        return self._queue.by_key()

    def health(self) -> dict[str, Any]:
        """ "ok" where every replica is ready, "degraded" where some are, else "loading" or "unavailable"."""
        states = {r.state for r in self.replicas if r.state != "asleep"}
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
        self.metrics.set_waiting_by_key(self.waiting_by_key())
        for replica in self.replicas:
            self.metrics.busy.labels(str(replica.number)).set(replica.busy)
            self.metrics.up.labels(str(replica.number)).set(replica.state == "ready")
