"""A replica: one process with a model of its own, on its own device, that writes the texts it is sent.

Four threads. The main one steps the engine, and nothing else, so that a device waits for nobody. One hears the front. One turns
tokens into text, looks for stop strings, and tells the front: it works while the main thread waits for the device. One says that the
process runs.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.heartbeat import BEATS, Channel, beat
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
    channel, made = Channel(connection), _Made()
    beat(channel, options.heartbeat_seconds / BEATS, lambda: (made.steps, made.busy))
    try:
        worker = _Worker(options, channel, inbox, made)
        channel.send(Ready())
        worker.run()
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(Failed(f"{type(error).__name__}: {error}"))
        raise


class _Made:
    """What the main thread has done, for the one that says so."""

    steps = 0
    busy = False


def _hear(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Everything the front says. Without a front there is nothing left to do, whatever the other threads are at."""
    with end_of_process():
        while not isinstance(message := connection.recv(), Stop):
            inbox.put(message)


def _load(options: WorkerOptions) -> tuple[Any, Any]:
    import torch
    import transformers

    from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer
    from mambakit.models.devices import default_dtype

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.sharers))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = options.dtype or default_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(options.model)


class _Worker:
    """The main thread: what is asked goes into the engine, which gives all of it its turn, one step after another."""

    def __init__(
        self, options: WorkerOptions, channel: Channel, inbox: queue.SimpleQueue[Any], made: _Made | None = None
    ):
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
        self.inbox, self.outbox = inbox, Outbox(channel, inbox)
        self.made = made or _Made()
        self.running: dict[Any, Text] = {}  # by `Request`
        self._warm(chunk_size if not on_cpu else 4)
        self.engine.prefix_cache = self.prefix_cache  # of what is asked alone

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
            self.made.busy = bool(self.running)
            self._hear(wait=not self.made.busy)
            self.made.busy = True
            self._step()

    def _hear(self, wait: bool = False) -> None:
        while True:
            try:
                message = self.inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(message, Task):
                self._start(message)
            else:
                self._cancel(message.id)

    def _cancel(self, id: int) -> None:
        for request, text in self.running.items():
            if text.id == id:
                request.cancel()

    def _start(self, task: Task) -> None:
        text = Text(task, self.tokenizer)
        try:
            with text.blamed():
                self.running[self._submit(task)] = text
        except Exception as error:
            if isinstance(error, _device_error()):
                raise
            text.fail(error)
            self._tell([(text, None, "error")])

    def _submit(self, task: Task) -> Any:
        import torch

        from mambakit.decoding.sampling_params import SamplingParams
        from mambakit.generation.engine import Request

        ids = torch.frombuffer(bytearray(task.prompt_ids), dtype=torch.int64)
        return self.engine.submit(Request(ids, SamplingParams(**task.sampling), task.max_new_tokens, share=task.share))

    def _step(self) -> None:
        self.made.steps += 1
        events: list[Event] = [(self.running[request], token, "") for request, token in self.engine.step()]
        for request in [r for r in self.running if r.finish_reason]:
            text = self.running.pop(request)
            text.error, text.cached_tokens = request.error, request.cached_tokens
            events.append((text, None, request.finish_reason))
        self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        busy = self.engine.busy
        self.outbox.put(busy, len(self.running) - busy, events)


def _device_error() -> type[Exception]:
    """What a device raises that answers nobody any more."""
    import torch

    return torch.AcceleratorError
