"""Grammars of texts, compiled off the main thread of a replica and kept for the texts that have the same."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from mambakit.serving.messages import Task

# Compiled grammars that are kept.
_MOST = 64


class Compiler:
    """Compiles the constraints of tasks in a thread of its own: a large grammar delays only the texts that have one.

    Args:
        model, tokenizer: of the replica.
        compiled: called, in that thread, with a task and its `Constraint`, or the exception that says why there is
            none.
    """

    def __init__(self, model: Any, tokenizer: Any, compiled: Callable[[Task, Any], None]):
        self._model, self._tokenizer, self._compiled = model, tokenizer, compiled
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._known: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._thread: threading.Thread | None = None

    def add(self, task: Task) -> None:
        """Compile a task's constraint. The thread starts with the first."""
        self._tasks.put(task)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            try:
                result = self._constraint(task)
            except Exception as error:
                result = error
            self._compiled(task, result)

    def _constraint(self, task: Task) -> Any:
        from mambakit.generation.constrain import Constraint

        assert task.options.constraint is not None
        kind, text = key = task.options.constraint
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = Constraint(self._model, self._tokenizer, **{kind: text})
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return self._known[key]
