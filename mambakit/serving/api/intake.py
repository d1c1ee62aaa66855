"""From the bytes of a body to a valid request with its prompts as token ids, off the event loop.

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
from typing import Any, Generic, TypeAlias, TypeVar

from mambakit.serving.api.declarations import Limits
from mambakit.serving.api.prompts import Codec
from mambakit.serving.errors import ApiError

_T = TypeVar("_T")
# Reads a body. It is a function of a module, so that a process finds it by its name, and its result can be pickled.
Prepare: TypeAlias = "Callable[[bytes, Codec, Limits], _T]"

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
        self._small: queue.Queue[_Body[Any]] = queue.Queue()
        self._large: queue.Queue[_Body[Any]] = queue.Queue()
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

    async def prepare(self, body: bytearray, read: Prepare[_T]) -> _T:
        """The result of ``read``. Raises its `ApiError`, or one where too many bodies wait to be parsed."""
        small = len(body) <= SMALL
        waiting = self._small if small else self._large
        if waiting.qsize() >= self.options.waiting:
            raise ApiError(
                503,
                f"{waiting.qsize()} requests wait to be read already (--max-unread); try again later",
                retry_after=1,
            )
        one: _Body[_T] = _Body(bytes(body), read, Future())
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
            one = self._small.get()
            one.answer(functools.partial(one.read, one.content, codec, limits))

    def stop(self) -> None:
        """Kill the processes and drop what waits."""
        for process in self._processes:
            process.kill()
        for waiting in (self._small, self._large):
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait().future.cancel()


@dataclass
class _Body(Generic[_T]):
    content: bytes
    read: Prepare[_T]
    future: Future[_T]

    def answer(self, result: Callable[[], _T]) -> None:
        if not self.future.set_running_or_notify_cancel():
            return  # the client disconnected
        try:
            self.future.set_result(result())
        except BaseException as error:
            self.future.set_exception(error)


class _Process:
    """A process that parses large bodies, and the thread that sends them to it."""

    def __init__(self, waiting: queue.Queue[_Body[Any]], known: tuple[Codec, Limits], seconds: float):
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
            one = self._waiting.get()
            one.answer(functools.partial(self._result, one))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(*self._known, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(_STARTING):
            raise EOFError
        self._connection.recv()

    def _result(self, one: _Body[Any]) -> Any:
        try:
            if self._process is None:
                self._start()
            self._connection.send(one.read)
            self._connection.send_bytes(one.content)
            in_time = self._connection.poll(self._seconds)
            kind, outcome = self._connection.recv() if in_time else ("late", {})
        except (EOFError, OSError) as error:
            self._end()
            _log.error("a process that reads requests ended: %s", type(error).__name__)
            raise ApiError(503, "the process that read this request ended; send it again", retry_after=1) from None
        if not in_time:
            self._end()
            limit = f"{self._seconds:g} seconds (--parse-seconds)"
            raise ApiError(400, f"the request was not read within {limit}; send a shorter one, or token ids")
        if kind == "refused":
            raise ApiError(**outcome)
        if kind == "failed":
            raise RuntimeError(outcome)
        return outcome

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
            read, body = connection.recv(), connection.recv_bytes()
            try:
                outcome: tuple[str, Any] = "read", read(body, codec, limits)
            except ApiError as error:
                outcome = "refused", {
                    "status": error.status, "message": error.message, "param": error.param, "code": error.code,
                    "retry_after": error.retry_after,
                }  # fmt: skip
            except Exception as error:
                outcome = "failed", f"{type(error).__name__}: {error}"
            connection.send(outcome)
