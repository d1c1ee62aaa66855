"""A line in the log for each request, when its response has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mambakit.quoting import cut
from mambakit.serving.logs import fields

_log = logging.getLogger("mambakit.requests")
# What machines ask for every few seconds is logged at the level "debug".
PROBES = frozenset({"/livez", "/readyz", "/live", "/ready", "/health", "/metrics"})
_NOTES = "request_notes"
_SEND = "send_part"


def note(scope: Scope, **values: Any) -> None:
    """Fields for the request's line in the log."""
    scope.setdefault(_NOTES, {}).update(values)


def sender_of_parts(scope: Scope) -> Send:
    """The server's own ``send``, for the parts of a body that comes for a long time: all applications on the way look
    at the beginning of a response alone, and would pass on each part."""
    found: Send = scope[_SEND]
    return found


class RequestLog:
    """An ASGI application around the one that gives requests their ids."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = scope[_NOTES] = {}
        scope[_SEND] = send
        began, status = time.monotonic(), 0

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            level = logging.DEBUG if scope["path"] in PROBES else logging.WARNING if status >= 500 else logging.INFO
            if _log.isEnabledFor(level):
                client = scope.get("client")
                values = {
                    "request_id": scope.get("request_id"), "method": cut(scope["method"]), "path": cut(scope["path"]),
                    "status": status, "seconds": round(time.monotonic() - began, 6),
                    "client": client[0] if client else None, **notes,
                }  # fmt: skip
                _log.log(level, "request", extra=fields(**values))
