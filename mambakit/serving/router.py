"""Which replica writes which text, and what becomes of a text when its replica dies. Knows neither torch nor HTTP.

Texts wait here, not at the replicas: each goes to the replica with the least to do at the moment that one can take it. Keys, their
clients and their requests take turns, and each request soon has a text at a replica, where turns are taken for the rows. All
methods run on the event loop's thread; two threads for each replica carry what is said to and from its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mambakit.serving import heartbeat, worker
from mambakit.serving.heartbeat import Watch
from mambakit.serving.jobs import Job
from mambakit.serving.messages import Batch, Beat, Cancel, Failed, Piece, Ready, Stop, Task, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import ApiError
from mambakit.serving.suspects import Suspects
from mambakit.serving.waiting import Waiting

_log = logging.getLogger("mambakit.serving")

# A replica that dies is started again at once, at most this often within so many seconds; then it waits.
RESTARTS, WINDOW = 3, 60.0
_PATIENCE = 5.0  # seconds for a process to exit when told to


@dataclass(eq=False)
class Replica:
    """A replica as the front sees it."""

    number: int
    device: str
    state: str = "loading"
    """"loading", "ready", "silent" while it is late to say that it runs, or "dead" until it is started again."""
    jobs: dict[int, Job] = field(default_factory=dict)
    busy: int = 0
    waiting: int = 0
    restarts: int = 0
    error: str = ""
    """Why it died last."""
    last_words: str = ""
    """Why its process is about to end, if it could say so."""
    been_ready: bool = False
    process: Any = None
    watch: Watch | None = None
    outgoing: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS))

    @property
    def name(self) -> str:
        return f"replica {self.number} ({self.device})"


class Router:
    """Replicas behind one queue.

    Args:
        options: of every replica; ``device`` and ``sharers`` are filled in here.
        devices: one for each replica.
        max_waiting: texts that may wait for a row; up to twice as many where those who come have less than their share.
        metrics: where it counts.
        failed: called when a replica cannot even start the first time, with the reason: a model that does not load, say.
    """

    def __init__(
        self,
        options: WorkerOptions,
        devices: Sequence[str],
        *,
        max_waiting: int,
        metrics: Metrics,
        failed: Callable[[str], None],
    ):
        self.options, self.max_waiting, self.metrics, self._failed = options, max_waiting, metrics, failed
        self.replicas = [Replica(number, device) for number, device in enumerate(devices)]
        self._suspects = Suspects()
        self._queue = Waiting(options.rows)
        self._stopping = False

    # -- texts -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Texts that have no row."""
        return len(self._queue) + sum(max(0, len(r.jobs) - self.options.rows) for r in self.replicas)

    def require_ready(self) -> None:
        """Raises an `ApiError` where no replica could take anything."""
        if not any(r.state == "ready" for r in self.replicas):
            states = "; ".join(f"{r.name}: {r.state}{f', {r.error}' if r.error else ''}" for r in self.replicas)
            raise ApiError(503, f"no replica is ready ({states}); try again in a few seconds", retry_after=5)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these texts, or none.

        Raises:
            ApiError: too many wait already, no replica is ready, or replicas die of such a text.
        """
        self._suspects.refuse(jobs)
        self.require_ready()
        if jobs and not self._queue.lets_in(jobs, self.replicas, self.max_waiting):
            message = (
                f"{self.waiting} texts wait already, and {len(jobs)} more are too many; at most {self.max_waiting} may "
                "(--max-waiting): try again later"
            )
            raise ApiError(429, message, retry_after=1)
        for job in jobs:
            self._queue.add(job)
        self._deal()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; those that have ended already are left alone."""
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

    def _deal(self) -> None:
        """Send waiting texts to the replicas that have room, the least busy first."""
        while found := self._queue.take(self.replicas):
            job, able = found
            full = self.options.rows
            replica = min(able, key=lambda r: (len(r.jobs) >= full, sum(job.left for job in r.jobs.values()), r.number))
            job.replica, replica.jobs[job.id] = replica, job
            replica.outgoing.put(Task(job.id, job.prompt_ids, job.sampling, job.max_new_tokens, job.stop, job.share))

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
            _log.error(
                "%s could not write a text of %d prompt tokens: %s", replica.name, job.prompt_tokens, piece.error
            )
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

    # -- replicas --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every replica's process; they are ready when `health` says so."""
        self._loop = asyncio.get_running_loop()
        for replica in self.replicas:
            self._launch(replica)
        self._watching = self._loop.create_task(heartbeat.ticking(self.options, self._tick))

    def _tick(self, seconds: float) -> None:
        """Kill what is stopped or stuck; a replica that is late gets nothing more meanwhile."""
        for replica in self.replicas:
            if replica.state == "dead" or replica.watch is None:
                continue
            reason = replica.watch.tick(seconds, loading=replica.state == "loading")
            if reason:
                self._give_up(replica, f"{reason} and was killed")
            elif replica.state == "ready" and replica.watch.silent:
                replica.state = "silent"
                _log.warning("%s is late to say that it runs", replica.name)
            elif replica.state == "silent" and not replica.watch.silent:
                replica.state = "ready"
                self._deal()

    def _give_up(self, replica: Replica, reason: str) -> None:
        process, replica.watch, replica.last_words = replica.process, None, reason
        process.kill()
        # A process that hangs in the kernel outlives that; its texts do not wait for it.
        self._loop.call_later(_PATIENCE, self._lost, replica, -9, process)

    def _launch(self, replica: Replica) -> None:
        if self._stopping:
            return
        # Processes that compute on the processors share their threads.
        sharers = sum(r.device.startswith("cpu") for r in self.replicas) if replica.device.startswith("cpu") else 1
        options = replace(self.options, device=replica.device, sharers=sharers)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        replica.state, replica.busy, replica.waiting = "loading", 0, 0
        replica.outgoing, replica.last_words, replica.watch = queue.SimpleQueue(), "", Watch(self.options)
        process = replica.process = context.Process(target=worker.main, args=(options, theirs), daemon=True)
        process.start()
        theirs.close()
        for target, *arguments in (
            (self._listen, replica, process, replica.watch, ours),
            (_talk, replica.outgoing, ours),
        ):
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def _listen(self, replica: Replica, process: Any, watch: Watch, connection: Any) -> None:
        """A thread: everything that a replica's process says, until it ends."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the front is ending, too
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = connection.recv()
                    watch.heard(message)
                    if not isinstance(message, Beat):
                        self._loop.call_soon_threadsafe(self._heard, replica, message)
            replica.outgoing.put(None)
            process.join(_PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()
            self._loop.call_soon_threadsafe(self._lost, replica, process.exitcode, process)

    def _heard(self, replica: Replica, message: Any) -> None:
        if isinstance(message, Batch):
            replica.busy, replica.waiting = message.busy, message.waiting
            for piece in message.pieces:
                self._deliver(replica, piece)
            if not any(piece.finish_reason for piece in message.pieces):
                return  # there is no more room than before
        elif isinstance(message, Ready):
            replica.state, replica.been_ready = "ready", True
            _log.info("%s is ready", replica.name)
        elif isinstance(message, Failed):
            replica.last_words = message.reason
        self._deal()

    def _lost(self, replica: Replica, exitcode: int, process: Any = None) -> None:
        if process is not None and (process is not replica.process or replica.state == "dead"):
            return  # given up before it ended
        if self._stopping:
            replica.state = "dead"
            return
        how = f"killed by signal {-exitcode}" if exitcode < 0 else f"exit status {exitcode}"
        replica.error = replica.last_words or how
        if not replica.been_ready:
            self._failed(f"{replica.name} could not start: {replica.error}")
        replica.state, replica.busy, replica.waiting = "dead", 0, 0
        now = time.monotonic()
        replica.deaths.append(now)
        often = len(replica.deaths) == RESTARTS and now - replica.deaths[0] < WINDOW
        delay = replica.deaths[0] + WINDOW - now if often else 0.0
        _log.error("%s died (%s); it is started again in %.0f s", replica.name, replica.error, delay)
        jobs, replica.jobs = list(replica.jobs.values()), {}
        suspected = self._suspects.died(jobs)
        for job in jobs:
            self._queue.ended(job)
            if not job.ended:
                message = f"{replica.name} died while it wrote this text ({replica.error})"
                self._fail(
                    job, suspected.get(job.id) or ApiError(503, f"{message}; send the request again", retry_after=1)
                )
        if all(r.state == "dead" for r in self.replicas) and often:
            self.fail_all(f"no replica is left; the last to die was {replica.name} ({replica.error})")
        self._loop.call_later(delay, self._relaunch, replica)

    def _relaunch(self, replica: Replica) -> None:
        if not self._stopping:
            replica.restarts += 1
            self.metrics.restarts.labels(str(replica.number)).inc()
            self._launch(replica)

    async def stop(self) -> None:
        """Tell every process to exit, and see that it does."""
        self._stopping = True
        self._watching.cancel()
        for replica in self.replicas:
            replica.outgoing.put(Stop())
            if replica.state == "silent" and replica.process is not None:
                replica.process.kill()
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and any(r.process.is_alive() for r in self.replicas if r.process):
            await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """No process outlives the front."""
        self._stopping = True
        for replica in self.replicas:
            if replica.process is not None:
                replica.process.kill()

    # -- being watched -----------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """ "ok" where every replica is ready, "degraded" where some are, else "loading" or "unavailable"."""
        states = {r.state for r in self.replicas}
        status = "degraded" if "ready" in states else "loading" if "loading" in states else "unavailable"
        return {
            "status": "ok" if states == {"ready"} else status,
            "waiting": self.waiting,
            "replicas": [
                {
                    "replica": r.number, "device": r.device, "state": r.state, "pid": r.process and r.process.pid,
                    "rows": self.options.rows, "busy": r.busy, "waiting": max(r.waiting, len(r.jobs) - self.options.rows),
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


def _talk(outgoing: queue.SimpleQueue[Any], connection: Any) -> None:
    """A thread: everything that is said to a replica's process, so that one that does not listen blocks nobody else."""
    with contextlib.suppress(OSError):
        while (message := outgoing.get()) is not None:
            connection.send(message)
