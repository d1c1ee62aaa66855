"""The endpoints, over a router."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import itertools
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mambakit.quoting import cut
from mambakit.serving import protocol
from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Piece
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import Answer, ApiError, Asked, Limits, Usage
from mambakit.serving.router import Router

# A prompt of ten million tokens is about this long; what is longer is a mistake, or malice.
MOST_BYTES = 64 << 20
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
        load: gives the model's tokenizer and what may be asked of it. It is called in a thread, since it takes as long as the
            replicas take to load.
        failed: called with the reason where it cannot.
        metrics: what /metrics shows.
        api_key: what a client must send as a bearer token; None asks for none.
    """

    def __init__(
        self,
        router: Router,
        name: str,
        load: Callable[[], tuple[Any, Limits]],
        failed: Callable[[str], None],
        metrics: Metrics,
        api_key: str | None = None,
    ):
        self.router, self.name, self.metrics = router, name, metrics
        self._load, self._failed, self._api_key = load, failed, api_key
        self._started = int(time.time())
        self._requests = itertools.count()
        # Tokenizers are not safe to use from several threads; one keeps a long prompt off the event loop.
        self._tokenizing = ThreadPoolExecutor(1)

    def starlette(self) -> Starlette:
        """The ASGI application; the replicas start and stop with it."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.router.start()
            self._loaded = asyncio.get_running_loop().run_in_executor(self._tokenizing, self._load)
            self._loaded.add_done_callback(self._report)
            try:
                yield
            finally:
                await self.router.stop()

        return Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/models", self._guarded(self.models)),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={ApiError: _refusal, HTTPException: _http_error, Exception: _bug},
            lifespan=lifespan,
        )

    def _report(self, loaded: asyncio.Future) -> None:
        if not loaded.cancelled() and (error := loaded.exception()) is not None:
            self._failed(str(error))

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            known = kind.lower() == "bearer" and hmac.compare_digest(key.encode(), (self._api_key or "").encode())
            if self._api_key is not None and not known:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
            return await endpoint(request)

        return guarded

    # -- endpoints ---------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        health = self.router.health()
        return JSONResponse(health, 200 if health["status"] in ("ok", "degraded") else 503)

    async def show_metrics(self, _: Request) -> Response:
        self.router.measure()
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._started, "owned_by": "mambakit"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        try:
            self.router.require_ready()
            body = protocol.parse_body(await _body(request))
            tokenizer, limits = await asyncio.shield(self._loaded)
            share = self._share(request)
            call = await self._call(protocol.parse(body, limits), tokenizer, limits, share)
            self.router.submit(call.jobs)
        except ApiError as error:
            self.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
            raise
        except ClientDisconnect:
            return _NOBODY
        try:
            # Nothing is sent before the first token: a replica that dies until then is an HTTP error.
            answered = await _while_connected(request, self._stream(call) if call.asked.stream else self._whole(call))
        except BaseException:
            self.router.cancel(call.jobs)
            raise
        if answered is None:
            self.router.cancel(call.jobs)
            return _NOBODY
        return answered

    # -- a request -----------------------------------------------------------------------------------------------------

    def _share(self, request: Request) -> tuple[Any, ...]:
        """Whose texts take turns with whose: keys with keys, one key's addresses with each other, an address's requests likewise."""
        key = (
            request.headers.get("authorization", "") if self._api_key is not None else ""
        )  # else anybody can make up many
        client = "" if request.client is None else request.client.host
        return hashlib.sha256(key.encode()).hexdigest()[:16], client, next(self._requests)

    async def _call(self, asked: Asked, tokenizer: Any, limits: Limits, share: tuple[Any, ...]) -> _Call:
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self._tokenizing)
        inbox = Inbox()
        lengths: list[int] = []
        jobs: list[Job] = []
        echoed: list[str] = []
        for prompt in asked.prompts:
            ids = await run(_ids, tokenizer, prompt) if isinstance(prompt, str) else prompt
            protocol.check_tokens(ids, limits)
            lengths.append(len(ids))
            before = ""
            if asked.echo:
                before = prompt if isinstance(prompt, str) else await run(tokenizer.decode, ids)
            data = array("q", ids).tobytes()
            for copy in range(asked.n):
                sampling = asked.sampling_of(copy)
                jobs.append(Job(inbox, len(jobs), data, len(ids), sampling, asked.max_tokens, asked.stop, copy, share))
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

    async def _stream(self, call: _Call) -> Response:
        first = await call.inbox.take()
        return _EventStream(self._events(call, first), lambda: self.router.cancel(call.jobs))

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


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        message = "the prompt is empty and the tokenizer has no bos token to start from; give a prompt"
        raise ApiError(400, message, param="prompt")
    return [start]


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES >> 20} MiB; send a shorter prompt, or token ids")
    return bytes(body)


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


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{cut(request.method)} {cut(request.url.path)}: {error.detail}; there are POST /v1/completions, GET /v1/models, /health and /metrics"
    return JSONResponse(ApiError(error.status_code, what).body, error.status_code, error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    message = f"the server failed on this request ({type(error).__name__}); its log says more"
    return JSONResponse(ApiError(500, message).body, 500)
