"""The server's process: binds the socket, runs the application, drains, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn

from mambakit.serving.api.intake import Intake, IntakeOptions
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.http.access import AccessRules, is_loopback
from mambakit.serving.http.app import make_app
from mambakit.serving.http.connection import Connection, check_all
from mambakit.serving.http.connection_limits import BACKLOGS, ConnectionLimits, connections_that_fit
from mambakit.serving.http.keys import Keys
from mambakit.serving.http.services import Services
from mambakit.serving.http.tls import TlsOptions, load_certificate, make_context
from mambakit.serving.logs import LogOptions, fields
from mambakit.serving.messages import WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.replicas.supervisor import Supervisor
from mambakit.serving.states.options import StatesOptions, open_store
from mambakit.serving.tokenizing import load_tokenizer

_log = logging.getLogger("mambakit.serving")

# When the time to drain is over each text ends with an error, which clients have this many seconds to read.
_LAST_RESPONSES = 1.0
_SWEEP = 0.25  # seconds between looks at the connections' deadlines
# A request is read by one thread and sent to a replica by another, and each waits so long for the interpreter where the
# event loop is busy; Python's own 5 ms are as long as a step of a model.
_SWITCH_SECONDS = 0.001
_COLLECTED = 20_000  # new objects, and the garbage collector looks at them
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
        worker: options of every replica.
        devices: one for each replica.
        name: of the model in the API.
        max_waiting: texts that may wait for a slot.
        max_new_tokens: of one text.
        max_prompt_tokens: of one prompt.
        max_texts: of one request: prompts times n.
        max_connections: None for as many as the limit of open files allows, up to the default.
        limits: of each connection.
        intake: limits on the reading of bodies.
        drain_seconds: how long running texts may continue after a signal to stop.
        request_seconds: how long a request may take.
        chat_template: Jinja, instead of the tokenizer's own; None: its own.
        states: where states are kept; their folder is `WorkerOptions.states_folder`.
        access: keys and allowed hosts and origins; ``loopback`` is filled in here.
        tls: the certificate of the address; None: plain HTTP.
        logs: of this process and of the replicas.
        read_keys: reads the keys again, on SIGHUP; None: there is nothing to read.
        playground: whether there is a page at `/`.
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
    max_connections: int | None = None
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    intake: IntakeOptions = field(default_factory=IntakeOptions)
    drain_seconds: float = 30.0
    request_seconds: float = 1800.0
    chat_template: str | None = None
    states: StatesOptions = field(default_factory=StatesOptions)
    access: AccessRules = field(default_factory=AccessRules)
    tls: TlsOptions | None = None
    logs: LogOptions = field(default_factory=LogOptions)
    read_keys: Callable[[], Keys] | None = None
    playground: bool = True


class _Server(uvicorn.Server):
    """uvicorn's server; reports when it accepts connections, and ends texts with an error after the drain time."""

    def __init__(
        self,
        config: uvicorn.Config,
        dispatcher: Dispatcher,
        drain_seconds: float,
        listening: Callable[[], None],
        reload: Callable[[], None],
    ):
        super().__init__(config)
        self._dispatcher, self._drain_seconds, self._listening = dispatcher, drain_seconds, listening
        self._reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            if _HANGUP is not None and threading.current_thread() is threading.main_thread():
                asyncio.get_running_loop().add_signal_handler(_HANGUP, self._reload)
            self._sweeping = asyncio.create_task(self._sweep())
            self._listening()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            check_all(self.server_state.connections)
            self._dispatcher.expire()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        reason = f"the server is stopping, and {self._drain_seconds:g} seconds were not enough for this text"
        loop.call_later(self._drain_seconds, self._dispatcher.fail_all, reason)
        loop.call_later(self._drain_seconds + _LAST_RESPONSES, self._abort)
        await super().shutdown(sockets)
        if self.force_exit:
            # A second interrupt: each request ends with an error, not in the middle of a line.
            self._dispatcher.fail_all("the server was told to stop at once")
            self._abort()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    asyncio.gather(*self.server_state.tasks, return_exceptions=True), _LAST_RESPONSES
                )
            await self.lifespan.shutdown()  # uvicorn leaves it out
        self._sweeping.cancel()

    def _abort(self) -> None:
        """Close the connections of clients that do not read."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def serve(options: ServerOptions) -> None:
    """Serve until a signal says to stop.

    Raises:
        ValueError: the address cannot be used, or a replica could not start.
    """
    room, backlog = connections_that_fit(options.max_connections, len(options.devices))
    listener = _bind(options.host, options.port)
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    dispatcher = make_dispatcher(options)
    supervisor = Supervisor(options.worker, dispatcher, failed)
    intake = make_intake(options)
    freeze_when_loaded(intake)
    sys.setswitchinterval(_SWITCH_SECONDS)
    options = replace(
        options,
        limits=replace(
            options.limits,
            connections=room,
            upload_bytes=options.states.upload_bytes if options.worker.states_folder else 0,
        ),
    )
    server = make_server(options, listener, dispatcher, supervisor, intake, failed, backlog)
    # uvicorn raises the signal again when it has stopped; by then all is done, and the exit status is to be 0.
    before = {number: signal.signal(number, _nothing) for number in _SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        supervisor.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failures:
        raise ValueError(failures[0])


def make_dispatcher(options: ServerOptions) -> Dispatcher:
    return Dispatcher(
        options.devices, slots=options.worker.slots, max_waiting=options.max_waiting, metrics=Metrics(),
        caching=options.worker.prefix_cache_bytes > 0,
    )  # fmt: skip


def make_intake(options: ServerOptions) -> Intake:
    return Intake(lambda: load_tokenizer(options), options.intake)


def freeze_when_loaded(intake: Intake) -> None:
    """Have the garbage collector leave alone what libraries and the tokenizer have made, as soon as they are loaded:
    to look at all of it takes 100 ms, in which no client is served, and happens several times a minute under load. Of
    what is new it waits for more than by default: the objects of some hundred requests are no garbage yet."""

    def freeze(_: Any) -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECTED)

    intake.loaded.add_done_callback(freeze)


def make_services(options: ServerOptions, access: AccessRules, dispatcher: Dispatcher, intake: Intake) -> Services:
    """What the endpoints call, with the states that were kept before."""
    caching = options.worker.prefix_cache_bytes > 0
    return Services(
        dispatcher, intake, options.name, access, options.request_seconds, caching, options.logs,
        states=open_store(options.worker.states_folder, options.states, len(access.keys.all)),
    )  # fmt: skip


def make_server(
    options: ServerOptions,
    listener: socket.socket,
    dispatcher: Dispatcher,
    supervisor: Supervisor,
    intake: Intake,
    failed: Callable[[str], None],
    backlog: int = BACKLOGS[0],
) -> uvicorn.Server:
    """The application on a socket, with its access rules and the limits of its connections, of which ``backlog`` may
    wait to be accepted."""
    host, port = listener.getsockname()[:2]
    access = replace(options.access, loopback=is_loopback(host))
    if not access.loopback and not access.keys:
        _log.warning(
            "--host %s is reached from other machines, and everybody there may use this server: require a key "
            "(--api-key-file), or listen on 127.0.0.1",
            options.host,
        )
    services = make_services(options, access, dispatcher, intake)
    config = uvicorn.Config(
        make_app(services, supervisor, failed, options.worker.model if options.playground else None),
        http=functools.partial(Connection, limits=options.limits),  # type: ignore[arg-type]
        ws="none", log_config=None, access_log=False, lifespan="on", proxy_headers=False, backlog=backlog,
        timeout_keep_alive=options.limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
    )  # fmt: skip
    context = None
    if options.tls is not None:
        context = make_context(options.tls)
        config.load()
        config.ssl = context
    scheme = "http" if context is None else "https"
    address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def listening() -> None:
        print(f"{options.name} at {address}, replicas: {', '.join(options.devices)}", flush=True)

    reload = functools.partial(_reload, options, context)
    return _Server(config, dispatcher, options.drain_seconds, listening, reload)


def _reload(options: ServerOptions, context: ssl.SSLContext | None) -> None:
    """Read keys and certificate again. One that is wrong changes nothing, and what was there before serves on."""
    try:
        if options.read_keys is not None:
            keys = options.read_keys()
            if not keys:
                raise ValueError("there are no keys any more; restart the server to serve without one")
            options.access.keys.replace(keys)
            _log.info("keys were read again", extra=fields(keys=len(keys.all)))
        if options.tls is not None and context is not None:
            load_certificate(context, options.tls)
            _log.info("the certificate was read again", extra=fields(file=options.tls.certificate))
    except ValueError as error:
        _log.error("not read again, and what was there before is used: %s", error)


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
            f"cannot listen on --host {host} --port {port}: {error.strerror}; use another, or --port 0 for any free one"
        ) from error
    return listener
