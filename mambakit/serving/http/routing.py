"""Endpoints as routes: an operation of the API and what answers it, behind its API key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Operation
from mambakit.serving.errors import ApiError
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
            endpoint.handle if endpoint.operation.open else _guarded(_asked(endpoint), access),
            methods=[endpoint.operation.method],
        )
        for endpoint in endpoints
    ]


def _asked(endpoint: Endpoint) -> Handler:
    """Refuses what an operation's query says besides its parameters. One without any ignores its query: clients of some
    services send a version of the API with every request."""
    known = [parameter.name for parameter in endpoint.operation.parameters if parameter.where == "query"]
    if not known:
        return endpoint.handle

    async def asked(request: Request) -> Response:
        given = [name for name, _ in request.query_params.multi_items()]
        for name in given:
            if name not in known:
                message = f"there is no parameter {quoted(name)}; served are {', '.join(known)}"
                raise ApiError(400, message, param=name, code="unknown_parameter")
            if given.count(name) > 1:
                raise ApiError(
                    400, f"the parameter {name} is there {given.count(name)} times; send it once", param=name
                )
        return await endpoint.handle(request)

    return asked


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
