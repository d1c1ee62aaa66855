"""`X-Request-Id`: the id that a client gives a request, or one that is made for it, sent back with every answer."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mambakit.serving.errors import ApiError

HEADER = "X-Request-Id"
_MOST = 128
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id(request: Request) -> str:
    """The id of a request."""
    found: str = request.scope["request_id"]
    return found


class RequestIds:
    """An ASGI application around another one: gives each request its id, and each answer the header."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        known = len(given) == 1 and _ID.fullmatch(given[0]) is not None
        scope["request_id"] = id = given[0].decode() if known else f"req_{uuid.uuid4().hex}"

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = id
            return send(message)

        if given and not known:
            error = ApiError(
                400, f"{HEADER} is not one value of 1 to {_MOST} visible ASCII characters; send such a one, or none"
            )
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)
