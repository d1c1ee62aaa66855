"""`/v1/states`: make, list, fork, branch, export, import and delete states."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mambakit.quoting import quoted
from mambakit.serving.api import state_bodies, state_operations
from mambakit.serving.api.states import Created
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.generation import DISCONNECTED, finish
from mambakit.serving.http.kept import Keeping, require_store
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.messages import Piece, TextOptions

_MOST_LISTED = 1000


def endpoints(services: Services) -> list[Endpoint]:
    return [
        Endpoint(operation, _bound(services, handle))
        for operation, handle in (
            (state_operations.LIST, _list), (state_operations.CREATE, _create), (state_operations.IMPORT, _import),
            (state_operations.SHOW, _show), (state_operations.DELETE, _delete), (state_operations.TEXT, _text),
            (state_operations.EXPORT, _export), (state_operations.FORK, _fork), (state_operations.BRANCH, _branch),
        )
    ]  # fmt: skip


def _bound(
    services: Services, handle: Callable[[Services, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def bound(request: Request) -> Response:
        require_store(services)
        try:
            return await handle(services, request)
        except ClientDisconnect:
            return DISCONNECTED

    return bound


def _id(request: Request) -> str:
    found: str = request.path_params["state"]
    return found


def _key(services: Services, request: Request) -> str:
    """The owner of states: the request's key."""
    return str(services.owner(request)[0])


def _query_number(request: Request, name: str, low: float, high: float, whole: bool = False) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or (whole and value != int(value)):
        what = "a whole number, " if whole else ""
        raise ApiError(400, f"{name} is {quoted(text)}; it must be {what}{low:g} to {high:.12g}", param=name)
    return value


# -- what needs no replica ---------------------------------------------------------------------------------------------


async def _list(services: Services, request: Request) -> Response:
    limit = int(_query_number(request, "limit", 1, _MOST_LISTED, whole=True) or 100)
    after = request.query_params.get("after", "")
    records, more = await asyncio.to_thread(require_store(services).list, _key(services, request), limit, after)
    data = [record.body for record in records]
    return JSONResponse({"object": "list", "data": data, "has_more": more})


async def _show(services: Services, request: Request) -> Response:
    record = await asyncio.to_thread(require_store(services).get, _key(services, request), _id(request))
    return JSONResponse(record.body)


async def _delete(services: Services, request: Request) -> Response:
    await asyncio.to_thread(require_store(services).delete, _key(services, request), _id(request))
    return JSONResponse({"id": _id(request), "object": "state", "deleted": True})


async def _export(services: Services, request: Request) -> Response:
    data = await asyncio.to_thread(require_store(services).export, _key(services, request), _id(request))
    headers = {"Content-Disposition": f'attachment; filename="{_id(request)}.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


async def _import(services: Services, request: Request) -> Response:
    services.dispatcher.require_ready()  # a replica says what a state of its model is
    expires_after = _query_number(request, "expires_after", 1, 10 * 366 * 86400)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/octet-stream":
        raise ApiError(415, "send the file as it is, with Content-Type: application/octet-stream")
    async with services.intake.receive(request.stream()) as body:
        data = bytes(body)
    store, layout = require_store(services), services.layout
    record = await asyncio.to_thread(store.take, _key(services, request), data, layout, expires_after)
    return JSONResponse(record.body)


async def _fork(services: Services, request: Request) -> Response:
    asked = await services.read(request, state_bodies.prepare_fork)
    store, keep = require_store(services), asked.keep
    record = await asyncio.to_thread(
        store.fork, _key(services, request), _id(request), keep.expires_after, keep.metadata
    )
    return JSONResponse(record.body)


async def _tokens(services: Services, request: Request) -> array[int]:
    """The tokens of a state's text."""
    store, key = require_store(services), _key(services, request)

    def read() -> array[int] | None:
        return store.read(store.get(key, _id(request)), services.layout).tokens

    services.dispatcher.require_ready()
    tokens = await asyncio.to_thread(read)
    if tokens is None:
        message = "the state was imported from a file that does not have its tokens; only its end is known"
        raise ApiError(400, message, code="state_without_tokens")
    return tokens


async def _text(services: Services, request: Request) -> Response:
    tokens = await _tokens(services, request)
    text = await services.intake.decode(tokens.tobytes())
    return JSONResponse({"id": _id(request), "tokens": tokens.tolist(), "text": text})


# -- what a replica reads ----------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """A request for a state: one job that only reads."""

    jobs: list[Job]
    inbox: Inbox

    async def response(self, keeping: Keeping) -> Response:
        last = Piece(0)
        while not last.finish_reason:
            for _, piece in await self.inbox.take():
                last = piece
        body = await keeping.acknowledge_only(last.kept)
        read = self.jobs[0].prompt_tokens
        usage: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
        if last.cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": last.cached_tokens}
        return JSONResponse(body | {"usage": usage})


async def _create(services: Services, request: Request) -> Response:
    services.dispatcher.require_ready()
    return await _read(services, request, await services.read(request, state_bodies.prepare_create), "prompt")


async def _branch(services: Services, request: Request) -> Response:
    asked = await services.read(request, state_bodies.prepare_branch)
    tokens = await _tokens(services, request)
    if asked.at > len(tokens):
        raise ApiError(400, f"at is {asked.at}, but the state's text has {len(tokens)} tokens; give fewer", param="at")
    store, key, kept = require_store(services), _key(services, request), tokens[: asked.at]
    nearest = await asyncio.to_thread(store.nearest, key, kept, services.layout)
    known, state = (0, "") if nearest is None else (nearest.tokens, nearest.id)
    if known == asked.at:
        record = await asyncio.to_thread(
            store.fork, key, state, asked.keep.expires_after, asked.keep.metadata, origin="branch", parent=_id(request)
        )
        return JSONResponse(record.body)
    asked = replace(asked, prompt=kept[known:].tobytes(), state=state)
    return await _read(services, request, asked, "branch", parent=_id(request))


async def _read(services: Services, request: Request, asked: Created, origin: str, parent: str = "") -> Response:
    """Have a replica read a prompt, and answer with the state after it."""
    share, length, inbox = services.owner(request), len(asked.prompt) // 8, Inbox()
    keeping = Keeping(services, str(share[0]), asked.keep, origin)
    try:
        await keeping.begin(asked.state, 1, length)
        keeping.came_from(parent)
        job = Job(
            inbox, 0, asked.prompt, length, {"temperature": 0.0}, 0, share=share, priority=asked.priority,
            deadline=services.deadline(asked.deadline),
            options=TextOptions(state=keeping.task, cache_salt=asked.cache_salt),
        )  # fmt: skip
        grant = services.submit(request, [job], length)
        reading = _Reading([job], inbox)
        return await finish(services, request, reading, lambda _: reading.response(keeping), grant)
    finally:
        keeping.close()
