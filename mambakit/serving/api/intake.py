"""From the bytes of a body to prompts of token ids, off the event loop.

Python's JSON parser holds the interpreter's lock: a body of a few megabytes would stop every stream for a second. Small
bodies are parsed by threads, large ones by processes, of which the first starts with the first large body.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import queue
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mambakit.serving.api.prompts import Codec, Prepared, prepare
from mambakit.serving.api.protocol import ApiError, Limits

_log = logging.getLogger("mambakit.serving")

# JSON of this many bytes is parsed within 5 ms, whatever it holds.
SMALL = 32 << 10
# This much of each body does not count towards `unfinished_bytes`: the number of connections bounds it.
_FREE = 64 << 10
_STARTING = 120.0  # seconds for a process to start


@dataclass(frozen=True)
class IntakeOptions:
    """
    Attributes:
        threads: for small bodies.
        processes: for large ones, at most.
        waiting: bodies that may wait for a thread, and for a process.
        seconds: for a process to parse and tokenise one body.
        unfinished_bytes: of all bodies that are being received or wait to be parsed.
    """

    threads: int = 2
    processes: int = 2
    waiting: int = 64
    seconds: float = 30.0
    unfinished_bytes: int = 64 << 20


class Intake:
    """Parses bodies.

    Args:
        load: gives the model's tokenizer and the limits of requests. It runs in a thread, because it takes as long as
            the replicas take to load.
        options: threads, processes and queues.
    """

    def __init__(self, load: Callable[[], tuple[Any, Limits]], options: IntakeOptions):
        self._load, self.options = load, options
        self.loaded: Future[tuple[Any, Codec, Limits]] = Future()
        """The tokenizer, and the codec and limits with which requests are parsed."""
        self._small: queue.Queue[_Body] = queue.Queue()
        self._large: queue.Queue[_Body] = queue.Queue()
        self._processes: list[_Process] = []
        self._unfinished = self._large_open = 0

    def start(self) -> None:
        # Daemons: none of them may keep the server from exiting.
        threading.Thread(target=self._begin, daemon=True).start()

    def _begin(self) -> None:
        try:
            tokenizer, limits = self._load()
            self.loaded.set_result((tokenizer, Codec(tokenizer), limits))
        except BaseException as error:
            self.loaded.set_exception(error)
            return
        for _ in range(self.options.threads):
            threading.Thread(target=self._read_small, daemon=True).start()

    @contextlib.asynccontextmanager
    async def receive(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytearray]:
        """A context with a whole body, which counts towards `unfinished_bytes` until it is left."""
        body, counted = bytearray(), 0
        try:
            async for part in parts:
                body += part
                more = max(0, len(body) - _FREE) - counted
                if self._unfinished + more > self.options.unfinished_bytes:
                    message = (
                        f"{self._unfinished >> 20} MiB of other requests' bodies are not received in full "
                        "(--max-unfinished-mb); try again later, or with a smaller body"
                    )
                    raise ApiError(503, message, retry_after=1)
                counted += more
                self._unfinished += more
            yield body
        finally:
            self._unfinished -= counted

    async def prepare(self, body: bytearray) -> Prepared:
        """Parse a body. Raises an `ApiError` for an invalid request, or where too many wait to be parsed."""
        small = len(body) <= SMALL
        waiting = self._small if small else self._large
        if waiting.qsize() >= self.options.waiting:
            raise ApiError(
                503,
                f"{waiting.qsize()} requests wait to be read already (--max-unread); try again later",
                retry_after=1,
            )
        one = _Body(bytes(body), Future())
        waiting.put(one)
        if small:
            return await asyncio.wrap_future(one.future)
        self._large_open += 1
        try:
            if self._large_open > len(self._processes) < self.options.processes:
                self._processes.append(_Process(self._large, self.loaded.result()[1:], self.options.seconds))
            return await asyncio.wrap_future(one.future)
        finally:
            self._large_open -= 1

    async def decode(self, ids: bytes) -> str:
        """The text of token ids."""
        tokenizer = self.loaded.result()[0]
        return await asyncio.to_thread(lambda: tokenizer.decode(array("q", ids).tolist()))

    def _read_small(self) -> None:
        _, codec, limits = self.loaded.result()
        while True:
            self._small.get().answer(functools.partial(prepare, codec=codec, limits=limits))

    def stop(self) -> None:
        """Kill the processes and drop what waits."""
        for process in self._processes:
            process.kill()
        for waiting in (self._small, self._large):
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait().future.cancel()


@dataclass
class _Body:
    content: bytes
    future: Future[Prepared]

    def answer(self, read: Callable[[bytes], Prepared]) -> None:
        if not self.future.set_running_or_notify_cancel():
            return  # the client disconnected
        try:
            self.future.set_result(read(self.content))
        except BaseException as error:
            self.future.set_exception(error)


class _Process:
    """A process that parses large bodies, and the thread that sends them to it."""

    def __init__(self, waiting: queue.Queue[_Body], known: tuple[Codec, Limits], seconds: float):
        self._waiting, self._known, self._seconds = waiting, known, seconds
        self._process: Any = None
        self._connection: Any = None
        self._stopped = False
        threading.Thread(target=self._run, daemon=True).start()

    def kill(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        while not self._stopped:
            self._waiting.get().answer(self._read)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(*self._known, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(_STARTING):
            raise EOFError
        self._connection.recv()

    def _read(self, body: bytes) -> Prepared:
        try:
            if self._process is None:
                self._start()
            self._connection.send_bytes(body)
            in_time = self._connection.poll(self._seconds)
            outcome = self._connection.recv() if in_time else None
        except (EOFError, OSError) as error:
            self._end()
            _log.error("a process that reads requests ended: %s", type(error).__name__)
            raise ApiError(503, "the process that read this request ended; send it again", retry_after=1) from None
        if not in_time:
            self._end()
            limit = f"{self._seconds:g} seconds (--parse-seconds)"
            raise ApiError(400, f"the request was not read within {limit}; send a shorter one, or token ids")
        if isinstance(outcome, Prepared):
            return outcome
        if isinstance(outcome, dict):
            raise ApiError(**outcome)
        raise RuntimeError(outcome)

    def _end(self) -> None:
        """The next body starts another process."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None


def _serve(codec: Codec, limits: Limits, connection: Connection) -> None:
    """The process: receives bodies and sends back requests, until the server is gone."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server handles them
    with contextlib.suppress(EOFError, OSError):
        connection.send("started")
        while True:
            body = connection.recv_bytes()
            try:
                outcome: Any = prepare(body, codec, limits)
            except ApiError as error:
                outcome = {
                    "status": error.status, "message": error.message, "param": error.param, "code": error.code,
                    "retry_after": error.retry_after,
                }  # fmt: skip
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            connection.send(outcome)
