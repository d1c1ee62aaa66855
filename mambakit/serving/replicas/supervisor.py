"""Keeps every replica running: start, heartbeat, restart, drain. Knows neither torch nor HTTP.

All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Replica
from mambakit.serving.messages import Batch, Failed, Ready, Stop, WorkerOptions
from mambakit.serving.replicas.heartbeat import every_interval
from mambakit.serving.replicas.process import ReplicaProcess
from mambakit.serving.replicas.scaling import Scaling
from mambakit.serving.replicas.transport import Start, Transport

_log = logging.getLogger("mambakit.serving")

# A replica is restarted at once, at most RESTARTS times within WINDOW seconds; after that it waits for the window to
# pass.
RESTARTS, WINDOW = 3, 60.0
_EXIT_SECONDS = 5.0  # for a process to exit after the request to


@dataclass(eq=False)
class Supervised:
    """A replica and its current process."""

    replica: Replica
    process: Transport | None = None
    been_ready: bool = False
    given_up: bool = False
    """Its process has been killed; it may hang in the kernel and exit late."""
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS))


class Supervisor:
    """The replicas of a dispatcher.

    Args:
        options: of every replica; ``device`` and ``sharers`` are filled in here.
        dispatcher: is notified of each replica's changes of state.
        failed: called with the reason when a replica cannot start the first time: a model that does not load, say.
        begin: starts a replica, as a process of this machine or elsewhere.
        sharing: whether all replicas compute on this machine, whose threads those on the CPU divide.
        scaling: how many of them run; None: all.
    """

    def __init__(
        self,
        options: WorkerOptions,
        dispatcher: Dispatcher,
        failed: Callable[[str], None],
        begin: Start = ReplicaProcess,
        sharing: bool = True,
        scaling: Scaling | None = None,
    ):
        self.options, self.dispatcher, self._failed = options, dispatcher, failed
        self._begin, self._sharing, self._scaling = begin, sharing, scaling
        self.supervised = [Supervised(replica) for replica in dispatcher.replicas]
        self._stopping = False

    def start(self) -> None:
        """Start every replica's process; `Dispatcher.health` says when they are ready."""
        self._loop = asyncio.get_running_loop()
        least = len(self.supervised) if self._scaling is None else self._scaling.options.least
        for number, one in enumerate(self.supervised):
            if number < least:
                self._launch(one)
            else:
                one.replica.state = "asleep"
        self._watching = self._loop.create_task(every_interval(self.options, self._tick))

    async def stop(self) -> None:
        """Tell every process to exit, wait for it, and kill those that do not."""
        self._stopping = True
        self._watching.cancel()
        for one in self.supervised:
            one.replica.outgoing.put(Stop())
            if one.replica.state == "silent" and one.process is not None:
                one.process.kill()
        deadline = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < deadline and any(one.process.is_alive() for one in self.supervised if one.process):
            await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """No process outlives the server."""
        self._stopping = True
        for one in self.supervised:
            if one.process is not None:
                one.process.kill()

    # -- their number

    def _scale(self) -> None:
        if self._scaling is None:
            return
        running = [one for one in self.supervised if one.replica.state not in ("asleep", "draining")]
        texts = self.dispatcher.waiting + sum(min(len(r.jobs), self.dispatcher.slots) for r in self.dispatcher.replicas)
        wanted = self._scaling.wanted(len(running), texts, time.monotonic())
        if wanted > len(running):
            resting = [one for one in self.supervised if one not in running]
            resting.sort(key=lambda one: one.replica.state == "asleep")  # one that still drains is there already
            for one in resting[: wanted - len(running)]:
                self._wake(one)
        elif wanted < len(running):
            idle = min((one for one in running if one.replica.state == "ready"), key=_texts_at, default=None)
            if idle is not None:
                _log.info("%s is not needed any more", idle.replica.name)
                idle.replica.state = "draining"
        for one in self.supervised:
            if one.replica.state == "draining" and not one.replica.jobs:
                one.replica.state = "asleep"
                one.replica.outgoing.put(Stop())

    def _wake(self, one: Supervised) -> None:
        if one.replica.state == "draining":
            self.dispatcher.ready(one.replica)
            return
        _log.info("%s is started for %d texts that wait", one.replica.name, self.dispatcher.waiting)
        if one.process is not None:
            one.process.kill()  # of its last run, where it has not ended yet
        self._launch(one)

    # -- one replica

    def _launch(self, one: Supervised) -> None:
        if self._stopping:
            return
        replica = one.replica
        on_cpu = [r for r in self.dispatcher.replicas if r.device.startswith("cpu")]
        sharers = len(on_cpu) if self._sharing and replica in on_cpu else 1  # they divide the CPU's threads
        options = replace(self.options, device=replica.device, sharers=sharers)
        replica.state, replica.busy, replica.waiting = "loading", 0, 0
        replica.began = self.dispatcher.clock()
        replica.outgoing = queue.SimpleQueue()
        one.given_up = False
        one.process = self._begin(
            options, replica.outgoing, self._loop,
            received=lambda process, message: self._receive(one, message, process),
            lost=lambda process, how: self._lost(one, how, process),
        )  # fmt: skip
        replica.pid = one.process.pid

    def _tick(self, seconds: float) -> None:
        """Kill processes that are stopped or stuck; a replica whose heartbeat is late gets no more texts meanwhile."""
        self._scale()
        for one in self.supervised:
            replica = one.replica
            if replica.state in ("dead", "asleep") or one.process is None or one.given_up:
                continue
            monitor = one.process.monitor
            reason = monitor.tick(seconds, loading=replica.state == "loading")
            if reason:
                self._give_up(one, f"{reason} and was killed")
            elif replica.state == "ready" and monitor.late:
                replica.state = "silent"
                _log.warning("%s: its heartbeat is late", replica.name)
            elif replica.state == "silent" and not monitor.late:
                self.dispatcher.ready(replica)

    def _give_up(self, one: Supervised, reason: str) -> None:
        process = one.process
        assert process is not None
        one.given_up, process.reason = True, reason
        process.kill()
        # A process that hangs in the kernel survives that; its texts do not wait for it.
        self._loop.call_later(_EXIT_SECONDS, self._lost, one, "killed by signal 9", process)

    def _receive(self, one: Supervised, message: Any, process: Transport) -> None:
        if process is not one.process or one.replica.state == "dead":
            return  # the last messages of a process that was given up
        if isinstance(message, Batch):
            self.dispatcher.receive(one.replica, message)
        elif isinstance(message, Ready):
            one.been_ready = True
            one.replica.pid = process.pid
            self.dispatcher.layout = message.layout
            _log.info("%s is ready", one.replica.name)
            self.dispatcher.ready(one.replica)
        elif isinstance(message, Failed):
            process.reason = message.reason

    def _lost(self, one: Supervised, how: str, process: Transport) -> None:
        replica = one.replica
        if process is not one.process or replica.state in ("dead", "asleep"):
            return  # it was given up before it exited, or was told to
        if self._stopping:
            replica.state = "dead"
            return
        reason = process.reason or how
        if not one.been_ready:
            self._failed(f"{replica.name} could not start: {reason}")
        now = time.monotonic()
        one.deaths.append(now)
        often = len(one.deaths) == RESTARTS and now - one.deaths[0] < WINDOW
        delay = one.deaths[0] + WINDOW - now if often else 0.0
        _log.error("%s died (%s); it is started again in %.0f s", replica.name, reason, delay)
        self.dispatcher.lost(replica, reason)
        replica.began = self.dispatcher.clock() + delay
        if often and all(r.state in ("dead", "asleep") for r in self.dispatcher.replicas):
            self.dispatcher.fail_all(f"no replica is left; the last to die was {replica.name} ({reason})")
        self._loop.call_later(delay, self._relaunch, one)

    def _relaunch(self, one: Supervised) -> None:
        if not self._stopping:
            one.replica.restarts += 1
            self.dispatcher.metrics.restarts.labels(str(one.replica.number)).inc()
            self._launch(one)


def _texts_at(one: Supervised) -> int:
    return len(one.replica.jobs)
