"""A replica: one process with a model of its own, on its own device, that writes the texts it is sent.

Three threads. The main one steps the engine, and nothing else, so that a device waits for nobody. One hears the front. One turns
tokens into text, looks for stop strings, and tells the front: it works while the main thread waits for the device.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.messages import Failed, Ready, Stop, Task, WorkerOptions
from mambakit.serving.outbox import Event, Outbox, Text, end_of_process
from mambakit.threads import bound_spinning


def main(options: WorkerOptions, connection: Connection) -> None:
    """The process, from its first line to its last. It ends when the front says so, or is gone."""
    bound_spinning()  # a server that was started from Python has not
    # A signal to the whole process group is the front's to handle: it lets the texts under way end first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(connection, inbox), daemon=True).start()
    try:
        worker = _Worker(options, connection, inbox)
        connection.send(Ready())
        worker.run()
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(Failed(f"{type(error).__name__}: {error}"))
        raise


def _hear(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Everything the front says. Without a front there is nothing left to do, whatever the other threads are at."""
    with end_of_process():
        while not isinstance(message := connection.recv(), Stop):
            inbox.put(message)


def _load(options: WorkerOptions) -> tuple[Any, Any]:
    import torch
    import transformers

    from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.sharers))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = options.dtype or ("float32" if device.type == "cpu" else "auto")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(options.model)


class _Worker:
    """The main thread: what is asked goes into the engine as rows become free, one step after another."""

    def __init__(self, options: WorkerOptions, connection: Connection, inbox: queue.SimpleQueue[Any]):
        from mambakit.generation.engine import Engine
        from mambakit.generation.prefix_cache import PrefixCache

        self.model, self.tokenizer = _load(options)
        on_cpu = self.model.device.type == "cpu"
        chunk_size = options.chunk_size or (512 if on_cpu else 2048)
        self.engine = Engine(self.model, options.rows, chunk_size)
        self.prefix_cache = (
            PrefixCache(self.model, memory_bytes=options.prefix_cache_bytes, chunk_size=chunk_size)
            if options.prefix_cache_bytes
            else None
        )
        self.inbox, self.outbox = inbox, Outbox(connection, inbox)
        self.pending: deque[Task] = deque()
        self.running: dict[Any, Text] = {}  # by `Request`
        self.preparing: Task | None = None
        self.cancelled = False  # the one that is being prepared
        self._warm(chunk_size if not on_cpu else 4)

    def _warm(self, length: int) -> None:
        """Compile kernels and capture graphs before anybody waits for them."""
        import torch

        from mambakit.generation.engine import Request

        self.engine.write(
            Request(torch.zeros(n, dtype=torch.int64, device="cpu"), max_new_tokens=2) for n in {4, length}
        )
        if self.prefix_cache is not None:
            self.prefix_cache.lookup([0])  # hashes the weights

    def run(self) -> None:
        threading.Thread(target=self.outbox.run, daemon=True).start()
        while True:
            self._hear(wait=not (self.pending or self.running))
            while self.pending and len(self.running) < self.engine.rows:
                self._start(self.pending.popleft())
            self._step()

    def _hear(self, wait: bool = False) -> None:
        while True:
            try:
                message = self.inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(message, Task):
                self.pending.append(message)
            else:
                self._cancel(message.id)

    def _cancel(self, id: int) -> None:
        if self.preparing is not None and self.preparing.id == id:
            self.cancelled = True
        for task in self.pending:
            if task.id == id:
                self.pending.remove(task)
                self._tell([(Text(task, self.tokenizer), None, "cancelled")])
                return
        for request, text in self.running.items():
            if text.id == id:
                request.cancel()

    def _start(self, task: Task) -> None:
        text = Text(task, self.tokenizer)
        try:
            self.running[self._submit(task, text)] = text
        except _CancelledError:
            self._tell([(text, None, "cancelled")])
        except _StepError as error:  # of the texts that went on meanwhile
            raise error.__cause__ or error from None
        except Exception as error:
            if isinstance(error, _device_error()):
                raise
            text.fail(error)
            self._tell([(text, None, "error")])

    def _submit(self, task: Task, text: Text) -> Any:
        import torch

        from mambakit.generation.engine import Request
        from mambakit.generation.stream import Sampling
        from mambakit.generation.token_ids import require_in_vocabulary

        ids = torch.frombuffer(bytearray(task.prompt_ids), dtype=torch.int64)
        with text.blamed():
            sampling = Sampling(**task.sampling)
            require_in_vocabulary("prompt", ids, self.model.config.vocab_size)
        options: dict[str, Any] = {"prompt_ids": ids}
        if self.prefix_cache is not None:
            saved = self.prefix_cache.statistics.tokens_saved
            self.preparing, self.cancelled = task, False
            try:
                state = self.prefix_cache.read(ids, progress=self._meanwhile)
            finally:
                self.preparing = None
            text.cached_tokens = self.prefix_cache.statistics.tokens_saved - saved
            options = {
                "prompt_ids": state.pending[0], "state": state.cache, "context": ids[:-1], "keep_state": True,
            }  # fmt: skip
        with text.blamed():
            return self.engine.submit(Request(sampling=sampling, max_new_tokens=task.max_new_tokens, **options))

    def _meanwhile(self, _read: int) -> None:
        """Between the chunks of a prompt that the prefix cache reads, the other texts go on."""
        self._hear()
        if self.cancelled:
            raise _CancelledError
        try:
            self._step()
        except Exception as error:
            raise _StepError from error

    def _step(self) -> None:
        events: list[Event] = [(self.running[request], token, "") for request, token in self.engine.step()]
        for request in [r for r in self.running if r.finish_reason]:
            text = self.running.pop(request)
            text.error = request.error
            events.append((text, None, request.finish_reason))
            if self.prefix_cache is not None and request.final_state is not None:
                # A text's last token is not read, unless the end of the text was chosen after it.
                tokens = request.tokens if request.finish_reason == "stop" else request.tokens[:-1]
                read = [*request.context.tolist(), *request.prompt_ids.tolist(), *tokens]
                self._store(read, request.final_state)
        self._tell(events)

    def _store(self, tokens: list[int], state: Any) -> None:
        assert self.prefix_cache is not None
        try:
            self.prefix_cache.store(tokens, state)
        except Exception as error:  # the text is whole all the same
            if isinstance(error, _device_error()):
                raise
            traceback.print_exception(error)

    def _tell(self, events: list[Event]) -> None:
        self.outbox.put(self.engine.busy, len(self.pending), events)


class _CancelledError(Exception):
    """The prompt that is being read belongs to nobody any more."""


class _StepError(Exception):
    """A step of the other texts failed, while a prompt was read."""


def _device_error() -> type[Exception]:
    """What a device raises that answers nobody any more."""
    import torch

    return torch.AcceleratorError
