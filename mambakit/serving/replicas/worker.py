"""A replica: one process with its own model on its own device, which generates the texts it is sent.

Five threads. The main one only steps the engine, so that the device never waits for anything else. One receives from
the server. One turns tokens into text, looks for stop strings and sends to the server; it works while the main thread
waits for the device. One sends heartbeats. One gives free memory back to the system.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mambakit.errors import LogitsError
from mambakit.serving.logs import configure
from mambakit.serving.messages import Failed, Ready, Task, WorkerOptions
from mambakit.serving.replicas.constraints import Compiler
from mambakit.serving.replicas.heartbeat import BEATS, Channel, send_heartbeats
from mambakit.serving.replicas.loading import load, load_drafter
from mambakit.serving.replicas.memory import release_free_memory
from mambakit.serving.replicas.outbox import Event, Outbox, Text
from mambakit.serving.replicas.receiving import Prefetch, receive
from mambakit.threads import bound_spinning

_log = logging.getLogger("mambakit.serving")

# Tokens per forward of prompts that are scored; between two layers of one, others' texts go on.
_SCORING_CHUNK = 512


def main(options: WorkerOptions, connection: Connection) -> None:
    """The process's main function. It ends when the server sends `Stop`, or is gone."""
    configure(options.logs)
    bound_spinning()  # the command does this for its children; a server that was started from Python has not
    # A signal to the whole process group is handled by the server, which drains before it stops the replicas.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    prefetch = Prefetch()
    threading.Thread(target=receive, args=(connection, inbox, prefetch), daemon=True).start()
    channel, progress = Channel(connection), _Progress()
    send_heartbeats(channel, options.heartbeat_seconds / BEATS, lambda: (progress.steps, progress.busy))
    release_free_memory()
    try:
        worker = _Worker(options, channel, inbox, progress)
        prefetch.states = worker.states
        channel.send(Ready(worker.states.layout))
        worker.run()
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(Failed(f"{type(error).__name__}: {error}"))
        _log.exception("the replica's process failed")
        raise SystemExit(1) from error


class _Progress:
    """Of the main thread; the heartbeat thread reads it."""

    steps = 0
    busy = False


class _Worker:
    """The main thread: submits tasks to the engine and steps it."""

    def __init__(
        self,
        options: WorkerOptions,
        channel: Channel,
        inbox: queue.SimpleQueue[Any],
        progress: _Progress | None = None,
    ):
        from mambakit.decoding.chunks import chunk_sizes, padded_buckets
        from mambakit.generation.engine import Engine
        from mambakit.generation.prefix_cache import PrefixCache
        from mambakit.serving.replicas.scoring import Scorer
        from mambakit.serving.replicas.states import Keeper, ReplicaStates

        self.model, self.tokenizer = load(options)
        on_cpu = self.model.device.type == "cpu"
        chunk_size = options.chunk_size or chunk_sizes(self.model.device).shared
        self.engine = Engine(
            self.model, options.slots, chunk_size, drafter=load_drafter(options), draft_tokens=options.draft_tokens
        )
        self.prefix_cache = (
            PrefixCache(
                self.model,
                memory_bytes=options.prefix_cache_bytes,
                folder=options.prefix_cache_folder,
                disk_bytes=options.prefix_cache_disk_bytes,
                chunk_size=chunk_size,
                write_behind=True,
            )
            if options.prefix_cache_bytes
            else None
        )
        self.inbox, self.outbox = inbox, Outbox(channel, inbox)
        self.states = ReplicaStates(self.model, options)
        self.outbox.keeper = Keeper(self.states, self.outbox.kept)
        self.progress = progress or _Progress()
        self.running: dict[Any, Text] = {}  # by `Request`
        self.scorer = Scorer(self.model, min(chunk_size, _SCORING_CHUNK))
        # What the scorer has, by `Task.id`: each with where it begins, and the constraint of the text that follows.
        self.scored: dict[int, tuple[Text, Task, Any, Any]] = {}
        self.compiler = Compiler(self.model, self.tokenizer, lambda task, found: inbox.put(_Compiled(task, found)))
        self.compiling: dict[int, Text | None] = {}  # by `Task.id`; None: cancelled
        self._warm_up(() if on_cpu else (*padded_buckets(), chunk_size))
        # After the warm-up, so that it holds prompts of clients only.
        self.engine.prefix_cache = self.scorer.prefix_cache = self.prefix_cache

    def _warm_up(self, lengths: tuple[int, ...]) -> None:
        """Compile kernels and capture graphs before the first request: of prompts of these lengths, greedy texts and
        sampled ones."""
        import torch

        from mambakit.decoding.sampling_params import SamplingParams
        from mambakit.generation.engine import Request

        settings = SamplingParams(0), SamplingParams(1, seed=0), SamplingParams(0.8, top_k=50, top_p=0.95, seed=0)
        for sampling in settings:  # a graph of prompts is captured at its second use
            self.engine.write(
                Request(torch.zeros(n, dtype=torch.int64, device="cpu"), sampling, 2) for n in {4, *lengths}
            )
        if self.engine.drafts is not None:
            self.engine.drafts.prepare()
        if self.prefix_cache is not None:
            self.prefix_cache.lookup([0])  # hashes the weights

    def run(self) -> None:
        threading.Thread(target=self.outbox.run, daemon=True).start()
        while True:
            self.progress.busy = bool(self.running or self.scored)
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
            elif isinstance(message, _Compiled):
                self._compiled(message)
            else:
                self._cancel(message.id)

    def _cancel(self, id: int) -> None:
        for request, text in self.running.items():
            if text.id == id:
                request.cancel()
        if id in self.scored:
            text, *_ = self.scored.pop(id)
            self.scorer.cancel(id)
            self._send([(text, None, "cancelled")])
        if id in self.compiling:
            self.compiling[id] = None

    def _start(self, task: Task) -> None:
        text = Text(task, self.tokenizer)
        with self._may_fail(text), text.bad_request():
            if task.options.constraint is not None:
                self.compiling[task.id] = text
                self.compiler.add(task)
            else:
                self._score_or_write(text, task)

    def _compiled(self, message: _Compiled) -> None:
        text = self.compiling.pop(message.task.id)
        if text is None:
            self._send([(Text(message.task, self.tokenizer), None, "cancelled")])
            return
        with self._may_fail(text), text.bad_request():
            if isinstance(message.found, Exception):
                raise message.found
            self._score_or_write(text, message.task, message.found)

    @contextlib.contextmanager
    def _may_fail(self, text: Text) -> Iterator[None]:
        """What is raised in here ends this text alone; but the device's errors."""
        try:
            yield
        except Exception as error:
            if isinstance(error, _device_error()):
                raise
            text.fail(error)
            self._send([(text, None, "error")])

    def _score_or_write(self, text: Text, task: Task, constraint: Any = None) -> None:
        beginning = self.states.begin(task, write=bool(task.max_new_tokens))
        text.left = beginning.left
        text.goes_on = task.options.state is not None and bool(task.options.state.start)
        if task.options.scores:
            self.scorer.add(task.id, task, beginning.cache, beginning.pending)
            self.scored[task.id] = text, task, beginning, constraint
        elif task.max_new_tokens:
            self._submit(text, task, beginning, constraint)
        elif text.left is not None and not text.left.states:
            self._submit(text, task, beginning)
        else:
            self._send([(text, None, "length")])

    def _submit(self, text: Text, task: Task, beginning: Any, constraint: Any = None) -> None:
        """Have the engine write a text after its ``beginning``, or only read its prompt but for the last token."""
        from mambakit.decoding.sampling_params import SamplingParams
        from mambakit.generation.engine import Request

        options, sampling, ids = task.options, SamplingParams(**task.sampling), beginning.ids
        text.reads = not task.max_new_tokens
        request = Request(
            ids[:-1] if text.reads else ids, sampling if constraint is None else constraint.sampling(sampling),
            task.max_new_tokens or 1, state=beginning.cache, context=beginning.read, share=task.share,
            log_probs=options.log_probs, min_new_tokens=options.min_new_tokens, ignore_ends=options.ignore_ends,
            keep_states=text.left is not None, cache_salt=options.cache_salt,
        )  # fmt: skip
        text.log_probs = None if options.log_probs is None else request.token_log_probs
        self.running[self.engine.submit(request)] = text

    def _was_scored(self, id: int, found: Any) -> None:
        """``found`` are `PromptScores` or `ContinuationScores`."""
        text, task, beginning, constraint = self.scored.pop(id)
        if task.options.continuations is not None:
            text.continuations, text.cached_tokens = found.scores, found.cached_tokens
            self._send([(text, None, "length")])
            return
        text.prompt_log_probs = found.scored
        if not task.max_new_tokens and text.left is not None:
            text.left.states = [found.state]
        self._send([(text, None, "" if task.max_new_tokens else "length")])
        if task.max_new_tokens:
            with self._may_fail(text):
                self._submit(text, task, self.states.after_scoring(beginning, found.state), constraint)

    def _was_not_scored(self, id: int, error: Exception) -> None:
        text, *_ = self.scored.pop(id)
        with self._may_fail(text):
            raise error

    def _step(self) -> None:
        self.progress.steps += 1
        if self.scored:
            self.scorer.step(self._was_scored, self._was_not_scored)
        written: dict[Text, list[int]] = {}  # a look has several tokens of a text
        for request, token in self.engine.step():
            written.setdefault(self.running[request], []).append(token)
        events: list[Event] = [(text, tokens, "") for text, tokens in written.items() if not text.reads]
        for request in [r for r in self.running if r.finish_reason]:
            text = self.running.pop(request)
            text.error, text.cached_tokens = request.error, request.cached_tokens
            if request.finish_reason == "error":
                text.blame(request.exception or LogitsError(request.error))
            if text.left is not None:
                text.left.states, text.left.tokens = request.states, [] if text.reads else request.tokens
            events.append((text, None, request.finish_reason))
        self._send(events)

    def _send(self, events: list[Event]) -> None:
        busy = self.engine.busy
        self.outbox.put(busy, len(self.running) + len(self.scored) + len(self.compiling) - busy, events)


@dataclass(frozen=True)
class _Compiled:
    """To the main thread: a task's constraint, or the exception that says why there is none."""

    task: Task
    found: Any


def _device_error() -> type[Exception]:
    """Raised by a device that cannot be used any more; it ends the process."""
    import torch

    return torch.AcceleratorError
