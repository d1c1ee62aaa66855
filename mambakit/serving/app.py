"""The endpoints, over a router."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mambakit.serving import protocol
from mambakit.serving.access import Access, AccessRules
from mambakit.serving.intake import Intake
from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Piece
from mambakit.serving.metrics import Metrics
from mambakit.serving.prompts import Prepared, check_echo
from mambakit.serving.protocol import Answer, ApiError, Asked, Usage
from mambakit.serving.refusals import bug, http_error, refusal, require_json
from mambakit.serving.router import Router

_T = TypeVar("_T")


@dataclass
class _Call:
    """A request on its way through."""

    asked: Asked
    answer: Answer
    inbox: Inbox
    jobs: list[Job]
    usage: Usage
    echoed: list[str] = field(default_factory=list)
    """For each text, what stands before it."""

    def count(self, index: int, piece: Piece) -> None:
        self.usage.count(index, piece.tokens, piece.cached_tokens if piece.finish_reason else None)


class App:
    """Completions of one model.

    Args:
        router: where the texts are written.
        name: what the model goes by.
        intake: reads what is asked.
        failed: called with the reason where it cannot.
        metrics: what /metrics shows.
        access: who may ask.
        request_seconds: for a request, from its arrival to the end of its last text.
    """

    def __init__(
        self,
        router: Router,
        name: str,
        intake: Intake,
        failed: Callable[[str], None],
        metrics: Metrics,
        access: AccessRules,
        request_seconds: float,
    ):
        self.router, self.name, self.metrics, self.intake, self.access = router, name, metrics, intake, access
        self._failed, self._request_seconds = failed, request_seconds
        self._started = int(time.time())
        self._requests = itertools.count()

    def starlette(self) -> Starlette:
        """The ASGI application; the replicas start and stop with it."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.router.start()
            self.intake.loaded.add_done_callback(self._report)
            self.intake.start()
            try:
                yield
            finally:
                self.intake.stop()
                await self.router.stop()

        middleware = [Middleware(Access, rules=self.access)]
        if self.access.origins:  # browsers ask first, and are told
            middleware.append(
                Middleware(
                    CORSMiddleware, allow_origins=self.access.origins, allow_methods=["GET", "POST"],
                    allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After"],
                )
            )  # fmt: skip
        return Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/models", self._guarded(self.models)),
                Route("/health", self.health),
                Route("/live", self.live),
                Route("/ready", self.ready),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={ApiError: refusal, HTTPException: http_error, Exception: bug},
            lifespan=lifespan,
            middleware=middleware,
        )

    def _report(self, loaded: Future) -> None:
        if not loaded.cancelled() and (error := loaded.exception()) is not None:
            self._failed(str(error))

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self.access.require_key(request.headers.get("authorization", ""))
            return await endpoint(request)

        return guarded

    # -- endpoints ---------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        health = self.router.health()
        if health["status"] in ("ok", "degraded") and not self.intake.loaded.done():
            health["status"] = "loading"
        return JSONResponse(health, 200 if health["status"] in ("ok", "degraded") else 503)

    async def live(self, _: Request) -> Response:
        """The front answers; its replicas may not."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a request that comes now is answered."""
        self.router.require_ready()
        if not self.intake.loaded.done():
            raise ApiError(503, "the tokenizer is being loaded; try again in a few seconds", retry_after=5)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        self.router.measure()
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._started, "owned_by": "mambakit"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        try:
            # What costs little is looked at before the body.
            self.router.require_ready()
            require_json(request)
            await asyncio.shield(asyncio.wrap_future(self.intake.loaded))
            async with self.intake.receive(request.stream()) as body:
                prepared = await self.intake.prepare(body)
            call = await self._call(prepared, self._share(request))
            self.router.submit(call.jobs)
        except ApiError as error:
            self.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
            raise
        except ClientDisconnect:
            return _NOBODY
        # Counted from here: until now the connection's and the intake's limits held.
        late = asyncio.get_running_loop().call_later(self._request_seconds, self._expire, call)
        try:
            # Nothing is sent before the first token: a replica that dies until then is an HTTP error.
            answered = await _while_connected(
                request, self._stream(call, late) if call.asked.stream else self._whole(call)
            )
        except BaseException:
            late.cancel()
            self.router.cancel(call.jobs)
            raise
        if not isinstance(answered, _EventStream):
            late.cancel()
        if answered is None:
            self.router.cancel(call.jobs)
            return _NOBODY
        return answered

    def _expire(self, call: _Call) -> None:
        message = f"the request was not done within {self._request_seconds:g} seconds (--request-seconds); ask for fewer tokens"
        call.inbox.fail(ApiError(504, message))
        self.router.cancel(call.jobs)

    # -- a request -----------------------------------------------------------------------------------------------------

    def _share(self, request: Request) -> tuple[Any, ...]:
        """Whose texts take turns with whose: keys with keys, one key's addresses with each other, an address's requests likewise."""
        client = "" if request.client is None else request.client.host
        return self.access.who(request.headers.get("authorization", "")), client, next(self._requests)

    async def _call(self, prepared: Prepared, share: tuple[Any, ...]) -> _Call:
        asked, inbox = prepared.asked, Inbox()
        lengths: list[int] = []
        jobs: list[Job] = []
        echoed: list[str] = []
        for ids, text in zip(prepared.prompts, prepared.texts, strict=True):
            length = len(ids) // 8
            lengths.append(length)
            before = ""
            if asked.echo:
                before = await self.intake.decode(ids) if text is None else text
                check_echo(asked.n * len(before))
            for copy in range(asked.n):
                sampling = asked.sampling_of(copy)
                jobs.append(Job(inbox, len(jobs), ids, length, sampling, asked.max_tokens, asked.stop, copy, share))
                echoed.append(before)
        usage = Usage(lengths, asked.n, caching=bool(self.router.options.prefix_cache_bytes))
        return _Call(asked, Answer(self.name), inbox, jobs, usage, echoed)

    async def _whole(self, call: _Call) -> Response:
        texts: list[list[str]] = [[before] for before in call.echoed]
        reasons = [""] * len(texts)
        while not all(reasons):
            for index, piece in await call.inbox.take():
                texts[index].append(piece.text)
                reasons[index] = piece.finish_reason
                call.count(index, piece)
        joined = ["".join(parts) for parts in texts]
        return JSONResponse(call.answer.whole(zip(joined, reasons, strict=True), call.usage))

    async def _stream(self, call: _Call, late: asyncio.TimerHandle) -> Response:
        first = await call.inbox.take()

        def ended() -> None:
            late.cancel()
            self.router.cancel(call.jobs)

        return _EventStream(self._events(call, first), ended)

    async def _events(self, call: _Call, pieces: list[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        with_usage = call.asked.include_usage
        left = len(call.jobs)
        yield b"".join(call.answer.event(i, text, "", with_usage) for i, text in enumerate(call.echoed) if text)
        try:
            while True:
                gained: dict[int, tuple[str, str]] = {}
                for index, piece in pieces:
                    call.count(index, piece)
                    gained[index] = (gained.get(index, ("", ""))[0] + piece.text, piece.finish_reason)
                left -= sum(bool(reason) for _, reason in gained.values())
                yield b"".join(
                    call.answer.event(index, text, reason, with_usage)
                    for index, (text, reason) in gained.items()
                    if text or reason
                )
                if not left:
                    break
                pieces = await call.inbox.take()
        except ApiError as error:
            yield protocol.event(error.body)
            return
        if with_usage:
            yield call.answer.usage_event(call.usage)
        yield protocol.DONE


class _EventStream(StreamingResponse):
    """Server-sent events; ``ended`` is called however the stream ends."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are not to gather them
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


_NOBODY = Response(status_code=499)  # what proxies write down for a client that went away; nobody reads it


async def _while_connected(request: Request, answer: Awaitable[_T]) -> _T | None:
    """The answer, or None where the client went away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
