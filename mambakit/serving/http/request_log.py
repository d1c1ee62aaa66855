"""An id for each request, and a line in the log when its response has ended."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mambakit.quoting import cut
from mambakit.serving.logs import fields

_log = logging.getLogger("mambakit.requests")
_ID = re.compile(rb"[!-~]{1,128}")
# What machines ask for every few seconds is logged at the level "debug".
PROBES = frozenset({"/livez", "/readyz", "/live", "/ready", "/health", "/metrics"})
_ID_KEY, _NOTES_KEY = "mambakit.request_id", "mambakit.notes"


def request_id(scope: Scope) -> str:
    """The id of a request: the client's X-Request-Id where it sent one of visible ASCII, else a new one."""
    return scope[_ID_KEY]


def note(scope: Scope, **values: Any) -> None:
    """Fields for the request's line in the log."""
    scope.get(_NOTES_KEY, {}).update(values)


class RequestLog:
    """Middleware. The id goes out with the response, and stands in the log."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_ID_KEY] = name = _sent_id(scope["headers"]) or f"req-{uuid.uuid4().hex}"
        notes = scope[_NOTES_KEY] = {}
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", name.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            level = logging.DEBUG if scope["path"] in PROBES else logging.WARNING if status >= 500 else logging.INFO
            if _log.isEnabledFor(level):
                client = scope.get("client")
                values = {
                    "request_id": name, "method": cut(scope["method"]), "path": cut(scope["path"]), "status": status,
                    "seconds": round(time.monotonic() - began, 6), "client": client[0] if client else None, **notes,
                }  # fmt: skip
                _log.log(level, "request", extra=fields(**values))


def _sent_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    sent = [value for name, value in headers if name == b"x-request-id"]
    return sent[0].decode("ascii") if len(sent) == 1 and _ID.fullmatch(sent[0]) else ""
