"""A replica: one process with its own model on its own device, which generates the texts it is sent.

Four threads. The main one only steps the engine, so that the device never waits for anything else. One receives from
the server. One turns tokens into text, looks for stop strings and sends to the server; it works while the main thread
waits for the device. One sends heartbeats.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.logs import configure
from mambakit.serving.messages import Failed, Ready, Stop, Task, WorkerOptions
from mambakit.serving.replicas.heartbeat import BEATS, Channel, send_heartbeats
from mambakit.serving.replicas.outbox import Event, Outbox, Text, end_of_process
from mambakit.threads import bound_spinning

_log = logging.getLogger("mambakit.serving")


def main(options: WorkerOptions, connection: Connection) -> None:
    """The process's main function. It ends when the server sends `Stop`, or is gone."""
    configure(options.logs)
    bound_spinning()  # the command does this for its children; a server that was started from Python has not
    # A signal to the whole process group is handled by the server, which drains before it stops the replicas.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    channel, progress = Channel(connection), _Progress()
    send_heartbeats(channel, options.heartbeat_seconds / BEATS, lambda: (progress.steps, progress.busy))
    try:
        worker = _Worker(options, channel, inbox, progress)
        channel.send(Ready())
        worker.run()
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(Failed(f"{type(error).__name__}: {error}"))
        _log.exception("the replica's process failed")
        sys.exit(1)


class _Progress:
    """Of the main thread; the heartbeat thread reads it."""

    steps = 0
    busy = False


def _receive(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """A thread: everything the server sends. When the server is gone the process ends, whatever its other threads
    do.
    """
    with end_of_process():
        while not isinstance(message := connection.recv(), Stop):
            inbox.put(message)


def _load(options: WorkerOptions) -> tuple[Any, Any]:
    import torch
    import transformers

    from mambakit.models.adapters import merge_adapters
    from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer
    from mambakit.models.devices import default_dtype

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.sharers))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = options.dtype or default_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    if hasattr(model, "peft_config"):
        merge_adapters(model)  # plain layers: the decoders read their weights
    return model.to(device).eval(), AutoTokenizer.from_pretrained(options.model)


def _state(path: str | None, model: Any) -> Any:
    """The state that every text starts from, of one row; None without a file."""
    if path is None:
        return None
    from mambakit.generation.state import State

    state = State.load(path, model)
    if state.rows != 1:
        raise ValueError(f"{path} holds {state.rows} rows; select one and save it alone")
    return state


class _Worker:
    """The main thread: submits tasks to the engine and steps it."""

    def __init__(
        self,
        options: WorkerOptions,
        channel: Channel,
        inbox: queue.SimpleQueue[Any],
        progress: _Progress | None = None,
    ):
        from mambakit.decoding.chunks import chunk_sizes
        from mambakit.generation.engine import Engine
        from mambakit.generation.prefix_cache import PrefixCache

        self.model, self.tokenizer = _load(options)
        on_cpu = self.model.device.type == "cpu"
        chunk_size = options.chunk_size or chunk_sizes(self.model.device).shared
        self.engine = Engine(self.model, options.slots, chunk_size)
        self.prefix_cache = (
            PrefixCache(self.model, memory_bytes=options.prefix_cache_bytes, chunk_size=chunk_size)
            if options.prefix_cache_bytes
            else None
        )
        self.state = _state(options.state, self.model)
        self.inbox, self.outbox = inbox, Outbox(channel, inbox)
        self.progress = progress or _Progress()
        self.running: dict[Any, Text] = {}  # by `Request`
        self._warm_up(chunk_size if not on_cpu else 4)
        self.engine.prefix_cache = self.prefix_cache  # after the warm-up, so that it holds prompts of clients only

    def _warm_up(self, length: int) -> None:
        """Compile kernels and capture graphs before the first request."""
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
            self.progress.busy = bool(self.running)
            self._read_inbox(wait=not self.progress.busy)
            self.progress.busy = True
            self._step()

    def _read_inbox(self, wait: bool = False) -> None:
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
            with text.bad_request():
                self.running[self._submit(task)] = text
        except Exception as error:
            if isinstance(error, _device_error()):
                raise
            text.fail(error)
            self._send([(text, None, "error")])

    def _submit(self, task: Task) -> Any:
        import torch

        from mambakit.decoding.sampling_params import SamplingParams
        from mambakit.generation.engine import Request

        ids, cache = torch.frombuffer(bytearray(task.prompt_ids), dtype=torch.int64), None
        if self.state is not None:  # with its unread token, if it has one
            ids, cache = torch.cat([self.state.pending[0].cpu(), ids]), self.state.cache
        sampling = SamplingParams(**task.sampling)
        return self.engine.submit(Request(ids, sampling, task.max_new_tokens, state=cache, share=task.share))

    def _step(self) -> None:
        self.progress.steps += 1
        events: list[Event] = [(self.running[request], token, "") for request, token in self.engine.step()]
        for request in [r for r in self.running if r.finish_reason]:
            text = self.running.pop(request)
            text.error, text.cached_tokens = request.error, request.cached_tokens
            events.append((text, None, request.finish_reason))
        self._send(events)

    def _send(self, events: list[Event]) -> None:
        busy = self.engine.busy
        self.outbox.put(busy, len(self.running) - busy, events)


def _device_error() -> type[Exception]:
    """Raised by a device that cannot be used any more; it ends the process."""
    import torch

    return torch.AcceleratorError
