"""How the server tells a replica's process that is stopped or stuck from one that is busy.

A thread of the process sends a heartbeat at short intervals with the number of engine steps made. No heartbeats mean
that the process is stopped; work without new steps means that its main thread is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.messages import Heartbeat, WorkerOptions

# Heartbeats in `heartbeat_seconds`, after which the process is killed; after half of that time it gets no more texts.
BEATS = 8
# While a replica loads, the import of a large library holds the interpreter's lock, and the heartbeat waits for it.
_LOADING_SECONDS = 120.0


class Channel:
    """The worker's end of the pipe, for several threads."""

    def __init__(self, connection: Connection):
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)


def send_heartbeats(channel: Channel, seconds: float, progress: Callable[[], tuple[int, bool]]) -> None:
    """Start the thread that sends one every ``seconds``; ``progress`` gives (steps made, whether there is work)."""

    def run() -> None:
        waiting = threading.Event()
        with contextlib.suppress(OSError):  # the server is gone
            while True:
                channel.send(Heartbeat(*progress()))
                waiting.wait(seconds)

    threading.Thread(target=run, daemon=True).start()


async def every_interval(options: WorkerOptions, tick: Callable[[float], None]) -> None:
    """Call ``tick`` at every heartbeat interval with the seconds since the last call, at most two intervals.

    The bound keeps a pause of this process, or of the whole machine, from counting against the replicas.
    """
    interval = min(1.0, options.heartbeat_seconds / BEATS)
    last = time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now = time.monotonic()
        tick(min(now - last, 2 * interval))
        last = now


class HeartbeatMonitor:
    """The server's view of one process's heartbeats, in time that the server itself has run (see `every_interval`)."""

    def __init__(self, options: WorkerOptions):
        self._options = options
        self._silent = self._stuck = self._loading = 0.0
        self._last = Heartbeat(0, False)

    def received(self, message: Any) -> None:
        """Any message shows that the process runs."""
        self._silent = 0.0
        if isinstance(message, Heartbeat):
            if not message.busy or message.steps != self._last.steps:
                self._stuck = 0.0
            self._last = message

    @property
    def late(self) -> bool:
        """Whether the last heartbeat is too long ago for the process to get more texts."""
        return self._silent > self._options.heartbeat_seconds / 2

    def tick(self, seconds: float, loading: bool) -> str:
        """Count ``seconds``. Returns why the process is to be killed, or ""."""
        options = self._options
        self._silent += seconds
        self._loading += seconds if loading else 0.0
        self._stuck += seconds if self._last.busy and not loading else 0.0
        limit = max(_LOADING_SECONDS, options.heartbeat_seconds) if loading else options.heartbeat_seconds
        if self._silent > limit:
            return f"it sent nothing for {limit:g} seconds (--heartbeat-seconds)"
        if self._loading > options.load_seconds:
            return f"it was not ready within {options.load_seconds:g} seconds (--load-seconds)"
        if self._stuck > options.progress_seconds:
            return f"it made no step for {options.progress_seconds:g} seconds, and had work (--progress-seconds)"
        return ""
