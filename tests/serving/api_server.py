"""An API server without replicas, in a thread, to test HTTP alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mambakit.serving import server
from mambakit.serving.api.declarations import Limits
from mambakit.serving.api.intake import Intake
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Piece, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.server import ServerOptions

LIMITS = Limits(model="m", vocab_size=256, max_new_tokens=1000, max_prompt_tokens=10_000_000, most_texts=128)


def byte_tokenizer() -> Any:
    """As far as a server needs one: a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return SimpleNamespace(
        backend_tokenizer=backend,
        bos_token_id=0,
        eos_token_id=0,
        get_vocab=backend.get_vocab,
        decode=backend.decode,
        chat_template=None,
    )


class Replicas:
    """Replaces dispatcher and supervisor. Each text gains ``piece`` every ``seconds`` until it has all its tokens."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.piece, self.seconds = "x", 0.0
        self.cancelled = 0
        self.clock, self.layout = time.monotonic, None
        self.jobs: list[Any] = []

    def start(self) -> None:
        self._tasks: set[asyncio.Task] = set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def kill(self) -> None: ...
    def expire(self) -> None: ...
    def measure(self) -> None: ...
    def require_ready(self) -> None: ...

    def health(self) -> dict[str, Any]:
        return {"status": "ok"}

    def submit(self, jobs: list[Any]) -> None:
        self.jobs += jobs
        for job in jobs:
            task = asyncio.get_running_loop().create_task(self._write(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _write(self, job: Any) -> None:
        for left in reversed(range(job.max_new_tokens)):
            await asyncio.sleep(self.seconds)
            if job.ended:
                return
            job.tokens += 1
            job.inbox.put(job.index, Piece(job.id, self.piece, 1, "" if left else "length"))
        job.ended = True

    def cancel(self, jobs: list[Any]) -> None:
        for job in jobs:
            self.cancelled += not job.ended
            job.ended = True

    def fail_all(self, reason: str) -> None:
        for job in self.jobs:
            if not job.ended:
                job.ended = True
                job.inbox.fail(ApiError(503, reason, retry_after=1))


class ApiServer:
    def __init__(self, options: ServerOptions):
        self.replicas = Replicas()
        self.listener = socket.create_server((options.host, 0))
        self.address = self.listener.getsockname()
        intake = self.intake = Intake(lambda: (byte_tokenizer(), LIMITS), options.intake)
        self.server = server.make_server(
            options,
            self.listener,
            self.replicas,
            self.replicas,
            intake,
            lambda reason: None,  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        intake.loaded.result(10)
        if options.tls is None:
            self.health()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.address[1]}"

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(20)
        client.connect(self.address)
        return client

    def head(self, method: str = "POST", path: str = "/v1/completions", **headers: Any) -> bytes:
        given = {"Host": self.host, "Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items() if v is not None)]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def post(self, content: bytes | None = None, /, **body: Any) -> bytes:
        """A request's bytes."""
        content = json.dumps({"prompt": "a"} | body).encode() if content is None else content
        return self.head(Content_Length=len(content), Connection="close") + content

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """The first answer's status, and all bytes until the server closes the connection."""
        with self.connect() as client:
            with contextlib.suppress(OSError):
                client.sendall(request)
            return status_of(received := read_all(client)), received

    def health(self) -> float:
        """Seconds that it takes."""
        began = time.monotonic()
        assert self.ask(self.head("GET", "/health", Connection="close"))[0] == 200
        return time.monotonic() - began


def read_all(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            received += part
    return received


def status_of(received: bytes) -> int:
    """0 where nothing came."""
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    return int(received.split(b" ", 2)[1]) if received else 0


@contextlib.contextmanager
def api_server(**options: Any) -> Iterator[ApiServer]:
    worker = WorkerOptions("m")
    one = ApiServer(replace(ServerOptions(worker, ("cpu",), "m", drain_seconds=0.0), **options))
    try:
        yield one
    finally:
        one.server.should_exit = True
        one.thread.join(20)
        assert not one.thread.is_alive()
