"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mambakit.serving.api.answers import Answer, Usage
from mambakit.serving.api.intake import Intake
from mambakit.serving.api.prompts import Prepared, check_echo
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.access import Access, AccessRules
from mambakit.serving.http.completion import Completion, EventStream, while_connected
from mambakit.serving.http.refusals import bug, http_error, refusal, require_json
from mambakit.serving.replicas.supervisor import Supervisor

_DISCONNECTED = Response(status_code=499)  # what proxies log for a client that disconnected; it is never sent


class App:
    """Completions of one model.

    Args:
        dispatcher: takes the texts.
        supervisor: of the replicas, which start and stop with the application.
        name: of the model.
        intake: reads request bodies.
        failed: called with the reason where the tokenizer cannot be loaded.
        access: keys, hosts and origins.
        request_seconds: for a request, from its arrival to the end of its last text.
        caching: whether the replicas have a prefix cache.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        supervisor: Supervisor,
        name: str,
        intake: Intake,
        failed: Callable[[str], None],
        access: AccessRules,
        request_seconds: float,
        caching: bool,
    ):
        self.dispatcher, self.supervisor, self.metrics = dispatcher, supervisor, dispatcher.metrics
        self.name, self.intake, self.access = name, intake, access
        self._failed, self._request_seconds, self._caching = failed, request_seconds, caching
        self._started = int(time.time())
        self._requests = itertools.count()

    def starlette(self) -> Starlette:
        """The ASGI application; the replicas start and stop with it."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.supervisor.start()
            self.intake.loaded.add_done_callback(self._report)
            self.intake.start()
            try:
                yield
            finally:
                self.intake.stop()
                await self.supervisor.stop()

        middleware = [Middleware(Access, rules=self.access)]
        if self.access.origins:  # the answer to browsers' preflight requests
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
        health = self.dispatcher.health()
        if health["status"] in ("ok", "degraded") and not self.intake.loaded.done():
            health["status"] = "loading"
        return JSONResponse(health, 200 if health["status"] in ("ok", "degraded") else 503)

    async def live(self, _: Request) -> Response:
        """The server answers; its replicas may not."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a request that comes now is answered."""
        self.dispatcher.require_ready()
        if not self.intake.loaded.done():
            raise ApiError(503, "the tokenizer is being loaded; try again in a few seconds", retry_after=5)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        self.dispatcher.measure()
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._started, "owned_by": "mambakit"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        try:
            # Cheap checks come before the body is read.
            self.dispatcher.require_ready()
            require_json(request)
            await asyncio.shield(asyncio.wrap_future(self.intake.loaded))
            async with self.intake.receive(request.stream()) as body:
                prepared = await self.intake.prepare(body)
            completion = await self._completion(prepared, self._share(request))
            self.dispatcher.submit(completion.jobs)
        except ApiError as error:
            self.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
            raise
        except ClientDisconnect:
            return _DISCONNECTED
        # Timed from here: until now the limits of the connection and of the intake applied.
        timeout = asyncio.get_running_loop().call_later(self._request_seconds, self._expire, completion)

        def ended() -> None:
            timeout.cancel()
            self.dispatcher.cancel(completion.jobs)

        answer: Awaitable[Response] = completion.stream(ended) if completion.asked.stream else completion.whole()
        try:
            # Nothing is sent before the first token: a replica that dies until then is an HTTP error.
            response = await while_connected(request, answer)
        except BaseException:
            ended()
            raise
        if not isinstance(response, EventStream):
            ended()
        return _DISCONNECTED if response is None else response

    def _expire(self, completion: Completion) -> None:
        limit = f"{self._request_seconds:g} seconds (--request-seconds)"
        message = f"the request was not done within {limit}; ask for fewer tokens"
        completion.inbox.fail(ApiError(504, message))
        self.dispatcher.cancel(completion.jobs)

    # -- a request -----------------------------------------------------------------------------------------------------

    def _share(self, request: Request) -> tuple[Any, ...]:
        """The owner of its texts. Keys take turns, so do the clients of a key and the requests of a client."""
        client = "" if request.client is None else request.client.host
        return self.access.holder(request.headers.get("authorization", "")), client, next(self._requests)

    async def _completion(self, prepared: Prepared, share: tuple[Any, ...]) -> Completion:
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
        usage = Usage(lengths, asked.n, caching=self._caching)
        return Completion(asked, Answer(self.name), inbox, jobs, usage, echoed)
