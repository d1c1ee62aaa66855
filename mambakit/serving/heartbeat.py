"""How the front learns that a replica's process is stopped, or stuck, and not merely busy.

A thread of the process says at short intervals that it runs, and how many steps its main thread has made. Silence means that the
process is stopped; work without steps means that the main thread is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.messages import Beat, WorkerOptions

# Heartbeats in the time after which silence means death; after half of that time nothing more is sent to a replica.
BEATS = 8
# While a replica loads, importing a large library keeps its other threads from running.
_LOADING_SILENCE = 120.0


class Channel:
    """The worker's end of the pipe, for several threads."""

    def __init__(self, connection: Connection):
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)


def beat(channel: Channel, seconds: float, steps: Callable[[], tuple[int, bool]]) -> None:
    """Start the thread; ``steps`` gives the steps made, and whether there is work."""

    def run() -> None:
        waiting = threading.Event()
        with contextlib.suppress(OSError):  # the front is gone
            while True:
                channel.send(Beat(*steps()))
                waiting.wait(seconds)

    threading.Thread(target=run, daemon=True).start()


async def ticking(options: WorkerOptions, tick: Callable[[float], None]) -> None:
    """Call ``tick`` with the seconds since the last time; a pause of this process counts little."""
    interval = min(1.0, options.heartbeat_seconds / BEATS)
    last = time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now = time.monotonic()
        tick(min(now - last, 2 * interval))
        last = now


class Watch:
    """What the front makes of a replica's heartbeats.

    Time is counted in the front's own ticks: after a pause of the front, or of the whole machine, nobody is blamed for it.
    """

    def __init__(self, options: WorkerOptions):
        self._options = options
        self._silent = self._stuck = self._loading = 0.0
        self._last = Beat(0, False)

    def heard(self, message: Any) -> None:
        self._silent = 0.0
        if isinstance(message, Beat):
            if not message.busy or message.steps != self._last.steps:
                self._stuck = 0.0
            self._last = message

    @property
    def silent(self) -> bool:
        """Whether it is too late to trust it with more."""
        return self._silent > self._options.heartbeat_seconds / 2

    def tick(self, seconds: float, loading: bool) -> str:
        """``seconds`` have gone by. Why the process is to be killed, or ""."""
        options = self._options
        self._silent += seconds
        self._loading += seconds if loading else 0.0
        self._stuck += seconds if self._last.busy and not loading else 0.0
        patience = max(_LOADING_SILENCE, options.heartbeat_seconds) if loading else options.heartbeat_seconds
        if self._silent > patience:
            return f"it said nothing for {patience:g} seconds (--heartbeat-seconds)"
        if self._loading > options.load_seconds:
            return f"it was not ready within {options.load_seconds:g} seconds (--load-seconds)"
        if self._stuck > options.progress_seconds:
            return f"it made no step for {options.progress_seconds:g} seconds, and had work (--progress-seconds)"
        return ""
