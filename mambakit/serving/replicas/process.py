"""A replica as a process of this machine: the server's side of it, from its start to its exit.

One thread receives messages, and one sends them, so that a process that does not read its pipe blocks no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.messages import Heartbeat, WorkerOptions
from mambakit.serving.replicas import worker
from mambakit.serving.replicas.heartbeat import HeartbeatMonitor
from mambakit.serving.replicas.transport import Lost, Received

_EXIT_SECONDS = 5.0  # for a process to exit after its pipe has closed


class ReplicaProcess:
    """`Transport` to a started process, over a pipe.

    Args:
        main: the process's main function, given ``options`` and its end of the pipe.
    """

    def __init__(
        self,
        options: WorkerOptions,
        outgoing: queue.SimpleQueue[Any],
        loop: asyncio.AbstractEventLoop,
        received: Received,
        lost: Lost,
        main: Callable[[WorkerOptions, Connection], None] = worker.main,
    ):
        self.monitor = HeartbeatMonitor(options)
        self.reason = ""
        self._loop, self._received, self._lost = loop, received, lost
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(options, theirs), daemon=True)
        self._process.start()
        theirs.close()
        for target, *arguments in ((self._receive, ours, outgoing), (_send, outgoing, ours)):
            threading.Thread(target=target, args=arguments, daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def _receive(self, connection: Any, outgoing: queue.SimpleQueue[Any]) -> None:
        """A thread: forward every message to the event loop until the process ends."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = connection.recv()
                    self.monitor.received(message)
                    if not isinstance(message, Heartbeat):
                        self._loop.call_soon_threadsafe(self._received, self, message)
            outgoing.put(None)
            self._loop.call_soon_threadsafe(self._lost, self, end_of(self._process))


def end_of(process: Any) -> str:
    """How a process has ended that has closed its pipe; one that goes on is killed.

    Where another thread asks for it in the same moment (`is_alive`), that one is told, and notes the status a little
    later.
    """
    process.join(_EXIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    for _ in range(100):
        if (status := process.exitcode) is not None:
            return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        time.sleep(0.01)
    return "its exit status is not known"


def _send(outgoing: queue.SimpleQueue[Any], connection: Any) -> None:
    """A thread: send every message in order."""
    with contextlib.suppress(OSError):
        while (message := outgoing.get()) is not None:
            connection.send(message)
