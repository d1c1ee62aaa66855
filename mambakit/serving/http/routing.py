"""Endpoints as routes: an operation of the API and what answers it, behind its API key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mambakit.serving.api.declarations import Operation
from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.keys import Key
from mambakit.serving.http.request_log import note

_KEY = "api_key"

# Raises an `ApiError` for an answer that is one.
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """An operation and what answers it."""

    operation: Operation
    handle: Handler


def routes(endpoints: Iterable[Endpoint], access: AccessRules) -> list[Route]:
    """Starlette's routes. An operation that is not open requires a key."""
    return [
        Route(
            endpoint.operation.path,
            endpoint.handle if endpoint.operation.open else _guarded(endpoint.handle, access),
            methods=[endpoint.operation.method],
        )
        for endpoint in endpoints
    ]


def _guarded(handle: Handler, access: AccessRules) -> Handler:
    async def guarded(request: Request) -> Response:
        key = access.require_key(request.headers.get("authorization", ""))
        if key is not None:
            request.scope[_KEY] = key
            note(request.scope, key=key.name)
        return await handle(request)

    return guarded


def key_of(request: Request) -> Key | None:
    """The key that a guarded request was sent with; None where none is required."""
    found: Key | None = request.scope.get(_KEY)
    return found
