"""The front's process: a socket, the application on it, and an end at which nothing is left running."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

from mambakit.serving.app import App
from mambakit.serving.messages import WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import Limits
from mambakit.serving.router import Router

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class ServerOptions:
    """What is served, where, and how much of it.

    Attributes:
        devices: one for each replica.
        name: what the model goes by in the API.
        max_waiting: texts that may wait for a row.
        max_texts: of one request.
        drain_seconds: how long texts under way may go on after a signal to stop.
    """

    worker: WorkerOptions
    devices: tuple[str, ...]
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 256
    max_new_tokens: int = 4096
    max_prompt_tokens: int = 65536
    max_texts: int = 128
    drain_seconds: float = 30.0
    api_key: str | None = None


class _Server(uvicorn.Server):
    """uvicorn's, which says when it listens and ends texts with an error when the time to drain is over."""

    def __init__(self, config: uvicorn.Config, router: Router, drain_seconds: float, listening: Callable[[], None]):
        super().__init__(config)
        self._router, self._drain_seconds, self._listening = router, drain_seconds, listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        reason = f"the server is stopping, and {self._drain_seconds:g} seconds were not enough for this text"
        asyncio.get_running_loop().call_later(self._drain_seconds, self._router.fail_all, reason)
        await super().shutdown(sockets)


def serve(options: ServerOptions) -> None:
    """Serve until a signal says to stop.

    Raises:
        ValueError: the address cannot be used, or a replica could not start.
    """
    listener = _bind(options.host, options.port)
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    metrics = Metrics()
    router = Router(options.worker, options.devices, max_waiting=options.max_waiting, metrics=metrics, failed=failed)
    app = App(router, options.name, lambda: _load(options), failed, metrics, options.api_key)
    config = uvicorn.Config(
        app.starlette(), log_config=None, access_log=False, lifespan="on",
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def listening() -> None:
        print(f"{options.name} at {address}, replicas: {', '.join(options.devices)}", flush=True)

    server = _Server(config, router, options.drain_seconds, listening)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # uvicorn raises the signal again when it has stopped; by then all is done, and the exit status is to say so.
    before = {number: signal.signal(number, _nothing) for number in _SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        router.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failures:
        raise ValueError(failures[0])


def _load(options: ServerOptions) -> tuple[Any, Limits]:
    """The tokenizer, and what may be asked: all that the front needs to know of the model."""
    from mambakit.models.auto import AutoConfig, AutoTokenizer

    limits = Limits(
        model=options.name,
        vocab_size=AutoConfig.from_pretrained(options.worker.model).vocab_size,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        most_texts=min(options.max_texts, options.max_waiting + options.worker.rows * len(options.devices)),
    )
    return AutoTokenizer.from_pretrained(options.worker.model), limits


def _nothing(_number: int, _frame: Any) -> None:
    pass


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; take another, or --port 0 for any that is free"
        ) from error
    return listener
