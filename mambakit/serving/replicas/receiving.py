"""What a replica's process receives from the server."""

from __future__ import annotations

import contextlib
import queue
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.messages import Stop, Task
from mambakit.serving.replicas.outbox import end_of_process


class Prefetch:
    """Reads the file of the state that a task starts from before the main thread has the task, and would wait for it.

    Attributes:
        states: a `ReplicaStates`, as soon as there is one.
    """

    states: Any = None

    def __call__(self, message: Any) -> None:
        state = message.options.state if isinstance(message, Task) else None
        if state is not None and state.start and self.states is not None:
            with contextlib.suppress(Exception):  # the main thread finds the same
                self.states.load(state.start)


def receive(connection: Connection, inbox: queue.SimpleQueue[Any], prefetch: Prefetch) -> None:
    """A thread: everything the server sends. When the server is gone the process ends, whatever its other threads
    do.
    """
    with end_of_process():
        while not isinstance(message := connection.recv(), Stop):
            prefetch(message)
            inbox.put(message)
