"""A replica on any machine of a Ray cluster: an actor there, which holds the pipe of a process of its machine.

The model runs in that process, not in the actor, so that a device that fails takes nothing else with it, and the
worker is the same as without Ray. One thread here sends, one receives; the actor answers each with a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import threading
from dataclasses import dataclass, replace
from typing import Any

from mambakit.serving.messages import Heartbeat, WorkerOptions
from mambakit.serving.replicas.heartbeat import HeartbeatMonitor
from mambakit.serving.replicas.process import end_of
from mambakit.serving.replicas.transport import Lost, Received

# Messages that are sent, or fetched, together.
_MOST = 256
_POLL = 1.0  # seconds that the actor waits for a message before it answers without one
_ENDED = "its process ended"


@dataclass(frozen=True)
class Place:
    """What a replica needs of a machine.

    Attributes:
        cpus, gpus: that Ray reserves for it.
        resources: of the cluster's own, as Ray names them.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()


class ReplicaHost:
    """The actor: starts a worker's process on its machine, and hands messages on."""

    def __init__(self, options: WorkerOptions):
        from mambakit.serving.replicas import worker

        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(options, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def pid(self) -> int | None:
        return self._process.pid

    def send(self, messages: list[Any]) -> None:
        with contextlib.suppress(OSError):  # `receive` tells of its end
            for message in messages:
                self._connection.send(message)

    def receive(self) -> tuple[list[Any], str]:
        """(the messages that came, how the process ended or "")."""
        found: list[Any] = []
        try:
            if self._connection.poll(_POLL):
                while len(found) < _MOST and self._connection.poll():
                    found.append(self._connection.recv())
        except (EOFError, OSError):
            return found, end_of(self._process)
        return found, ""

    def kill(self) -> None:
        self._process.kill()


class RayReplica:
    """`Transport` to an actor.

    Args:
        place: where it may run.
    """

    def __init__(
        self,
        options: WorkerOptions,
        outgoing: queue.SimpleQueue[Any],
        loop: asyncio.AbstractEventLoop,
        received: Received,
        lost: Lost,
        *,
        place: Place,
    ):
        import ray

        self.monitor = HeartbeatMonitor(options)
        self.reason = ""
        self._loop, self._received, self._lost, self._outgoing = loop, received, lost, outgoing
        self._pid: int | None = None
        self._alive = True
        # Ray shows an actor the GPUs that are reserved for it, counted from 0.
        device = "cuda:0" if place.gpus else "cpu"
        remote: Any = ray.remote  # its annotations do not have concurrency groups
        host = remote(
            num_cpus=place.cpus, num_gpus=place.gpus, resources=dict(place.resources), max_restarts=0,
            scheduling_strategy="SPREAD", concurrency_groups={"sending": 1, "receiving": 1, "control": 1},
        )(ReplicaHost)  # fmt: skip
        self._host = host.remote(replace(options, device=device))
        for target in (self._receive, self._send):
            threading.Thread(target=target, daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._pid

    def is_alive(self) -> bool:
        return self._alive

    def kill(self) -> None:
        import ray

        ray.kill(self._host)

    def _receive(self) -> None:
        """A thread: forward every message to the event loop until the replica ends."""
        import ray

        how = ""
        try:
            self._wait_for_place()
            while not how:
                messages, how = ray.get(self._host.receive.options(concurrency_group="receiving").remote())
                for message in messages:
                    self.monitor.received(message)
                    if not isinstance(message, Heartbeat):
                        self._forward(self._received, message)
        except ray.exceptions.RayError as error:
            how = f"its actor was lost ({type(error).__name__})"
        self._alive = False
        self._outgoing.put(None)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._host)
        self._forward(self._lost, how or _ENDED)

    def _wait_for_place(self) -> None:
        """Until the cluster has a machine for it, perhaps a new one, no heartbeat can come."""
        import ray

        asked = self._host.pid.options(concurrency_group="control").remote()
        while True:
            try:
                self._pid = ray.get(asked, timeout=_POLL)
                return
            except ray.exceptions.GetTimeoutError:
                self.monitor.received(Heartbeat(0, False))

    def _forward(self, callback: Any, argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(callback, self, argument)

    def _send(self) -> None:
        """A thread: send every message in order; those that wait go together."""
        import ray

        sending = self._host.send.options(concurrency_group="sending")
        with contextlib.suppress(ray.exceptions.RayError):
            while (message := self._outgoing.get()) is not None:
                messages = [message]
                while len(messages) < _MOST:
                    try:
                        message = self._outgoing.get_nowait()
                    except queue.Empty:
                        break
                    if message is None:
                        return
                    messages.append(message)
                ray.get(sending.remote(messages))  # not more than one call on its way
