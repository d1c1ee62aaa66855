"""Keeps every replica's process running: start, heartbeat, restart, drain. Knows neither torch nor HTTP.

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

_log = logging.getLogger("mambakit.serving")

# A replica is restarted at once, at most RESTARTS times within WINDOW seconds; after that it waits for the window to
# pass.
RESTARTS, WINDOW = 3, 60.0
_EXIT_SECONDS = 5.0  # for a process to exit after the request to


@dataclass(eq=False)
class Supervised:
    """A replica and its current process."""

    replica: Replica
    process: ReplicaProcess | None = None
    been_ready: bool = False
    given_up: bool = False
    """Its process has been killed; it may hang in the kernel and exit late."""
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS))


class Supervisor:
    """The processes of a dispatcher's replicas.

    Args:
        options: of every replica; ``device`` and ``sharers`` are filled in here.
        dispatcher: is notified of each replica's changes of state.
        failed: called with the reason when a replica cannot start the first time: a model that does not load, say.
    """

    def __init__(self, options: WorkerOptions, dispatcher: Dispatcher, failed: Callable[[str], None]):
        self.options, self.dispatcher, self._failed = options, dispatcher, failed
        self.supervised = [Supervised(replica) for replica in dispatcher.replicas]
        self._stopping = False

    def start(self) -> None:
        """Start every replica's process; `Dispatcher.health` says when they are ready."""
        self._loop = asyncio.get_running_loop()
        for one in self.supervised:
            self._launch(one)
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

    # -- one replica

    def _launch(self, one: Supervised) -> None:
        if self._stopping:
            return
        replica = one.replica
        on_cpu = [r for r in self.dispatcher.replicas if r.device.startswith("cpu")]
        sharers = len(on_cpu) if replica in on_cpu else 1  # replicas on the CPU divide its threads
        options = replace(self.options, device=replica.device, sharers=sharers)
        replica.state, replica.busy, replica.waiting = "loading", 0, 0
        replica.began = self.dispatcher.clock()
        replica.outgoing = queue.SimpleQueue()
        one.given_up = False
        one.process = ReplicaProcess(
            options, replica.outgoing, self._loop,
            on_message=lambda process, message: self._receive(one, message, process),
            on_exit=lambda process, status: self._exited(one, status, process),
        )  # fmt: skip
        replica.pid = one.process.pid

    def _tick(self, seconds: float) -> None:
        """Kill processes that are stopped or stuck; a replica whose heartbeat is late gets no more texts meanwhile."""
        for one in self.supervised:
            replica = one.replica
            if replica.state == "dead" or one.process is None or one.given_up:
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
        self._loop.call_later(_EXIT_SECONDS, self._exited, one, -9, process)

    def _receive(self, one: Supervised, message: Any, process: ReplicaProcess) -> None:
        if process is not one.process or one.replica.state == "dead":
            return  # the last messages of a process that was given up
        if isinstance(message, Batch):
            self.dispatcher.receive(one.replica, message)
        elif isinstance(message, Ready):
            one.been_ready = True
            self.dispatcher.layout = message.layout
            _log.info("%s is ready", one.replica.name)
            self.dispatcher.ready(one.replica)
        elif isinstance(message, Failed):
            process.reason = message.reason

    def _exited(self, one: Supervised, status: int, process: ReplicaProcess) -> None:
        replica = one.replica
        if process is not one.process or replica.state == "dead":
            return  # it was given up before it exited
        if self._stopping:
            replica.state = "dead"
            return
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
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
        if often and all(r.state == "dead" for r in self.dispatcher.replicas):
            self.dispatcher.fail_all(f"no replica is left; the last to die was {replica.name} ({reason})")
        self._loop.call_later(delay, self._relaunch, one)

    def _relaunch(self, one: Supervised) -> None:
        if not self._stopping:
            one.replica.restarts += 1
            self.dispatcher.metrics.restarts.labels(str(one.replica.number)).inc()
            self._launch(one)
