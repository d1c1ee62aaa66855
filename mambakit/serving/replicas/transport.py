"""How the server reaches a replica, wherever that runs: messages to it, messages from it, and its loss.

`process.ReplicaProcess` is a process of this machine, `ray_actor.RayReplica` one on any machine of a Ray cluster.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from mambakit.serving.messages import WorkerOptions
from mambakit.serving.replicas.heartbeat import HeartbeatMonitor


class Transport(Protocol):
    """One started replica. It sends what is put into its queue, in order, and never blocks the event loop.

    Attributes:
        monitor: is told of every message that came.
        reason: why the replica ends, where that is known before it does.
    """

    monitor: HeartbeatMonitor
    reason: str

    @property
    def pid(self) -> int | None:
        """Of the replica's process; None while it is not known."""

    def is_alive(self) -> bool: ...

    def kill(self) -> None:
        """End the replica at once, whatever it does; `Lost` follows."""


# Both are called on the event loop. Every message but heartbeats, in order; and once how it ended.
Received: TypeAlias = Callable[[Transport, Any], None]
Lost: TypeAlias = Callable[[Transport, str], None]


class Start(Protocol):
    """Starts a replica: the classes of transports themselves."""

    def __call__(
        self,
        options: WorkerOptions,
        outgoing: queue.SimpleQueue[Any],
        loop: asyncio.AbstractEventLoop,
        received: Received,
        lost: Lost,
    ) -> Transport:
        """``outgoing``: the messages for the replica; None ends the thread that sends them."""
