"""Limits of connections: bytes, headers, time and their number. uvicorn parses HTTP and limits none of these.

A connection's phases: "idle" between requests, "headers" and "body" while a request is received, "answer" until the
response is complete, "closing" while a refusal is being sent. `Connection.check`, called a few times per second,
enforces deadlines.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Coroutine, Iterable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mambakit.serving.errors import ApiError
from mambakit.serving.http.connection_limits import UPLOADS, ConnectionLimits

# Seconds in which a refused client may finish sending and read the error: closing a socket with unread bytes resets it.
_LINGER = 2.0
# Bytes given to the parser at a time; the limits are checked in between.
_SLICE = 64 << 10
# A client that has closed the connection looks like one that has only finished sending. It gets an interim response
# after these seconds, doubled each time: a client that is gone resets the connection.
_FIRST_PROBE, _MOST_PROBE = 1.0, 16.0
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _RefusedError(Exception):
    """Raised in a callback to stop the parser in the middle of its input."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, within limits."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any):
        super().__init__(*args, **options)
        self._limits = limits
        self._phase, self._since = "headers", time.monotonic()
        self._overhead = self._body = 0
        """Bytes of this request, in and around its body."""
        self._begun = self._refused = self._half_closed = False
        self._probe_after, self._probe_at = _FIRST_PROBE, 0.0
        self._unsent_until: float | None = None
        """The deadline for the client to read what was written."""

    # -- what arrives --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) <= self._limits.connections:
            return
        others = [
            c for c in self.connections
            if isinstance(c, Connection) and c is not self and c._phase != "answer" and not c.transport.is_closing()
        ]  # fmt: skip
        if others:
            # Close a refused one first, else the one that has been longest without a complete request.
            min(others, key=lambda c: (c._phase != "closing", c._since)).transport.abort()
        else:
            self._refuse(503, f"{self._limits.connections} connections have requests already; try again later", 1)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not self._refused:
            in_headers = self._phase in ("idle", "headers")
            size = max(1, self._limits.header_bytes - self._overhead) if in_headers else _SLICE
            part, data = data[:size], data[size:]
            if self._phase == "idle":
                self._enter("headers")
            self._begun = True
            before = self._body
            try:
                self.parser.feed_data(part)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                # Where a limit of ours stopped the parser, the error is sent already.
                self._refuse(400, "the connection's bytes are no HTTP request; send HTTP/1.1, one request at a time")
                return
            self._overhead += len(part) - (self._body - before)
            if self._phase == "headers" and self._overhead >= self._limits.header_bytes:
                limit = f"the headers are longer than {self._limits.header_bytes} bytes"
                self._refuse(431, f"{limit}; send fewer, or serve with a larger --max-header-bytes")
            elif self._phase == "body" and self._overhead > 2 * self._limits.header_bytes + self._body // 4:
                self._refuse(
                    400, "the body comes in pieces that are too small, or with too much around them; send larger ones"
                )

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._phase == "answer" and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._half_closed, self._probe_at = True, time.monotonic() + self._probe_after
            return True  # keep the transport open: the client still reads
        if self._phase == "body" or (self._phase == "headers" and self._begun):
            self._refuse(400, "the connection ended before its request did")
        return None

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # Pipelining would need unbounded memory for what follows. A client may send it again on another connection.
            self._stop("a request came before the last one was answered; wait for the answer")
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            limit = f"the URL is longer than {self._limits.url_bytes} bytes"
            self._stop(f"{limit}; shorten it, or serve with a larger --max-url-bytes", 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase != "headers":
            return  # a trailer
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers:
            limit = f"there are more than {self._limits.headers} headers"
            self._stop(f"{limit}; send fewer, or serve with a larger --max-headers", 431)

    def on_headers_complete(self) -> None:
        length = self._check_headers()
        if length > self._most_bytes:
            self._stop(self._too_long, 413)
        super().on_headers_complete()
        self._enter("body")
        cycle = self.cycle
        sends = cycle.send

        def send(message: Any) -> Coroutine[Any, Any, None]:
            if cycle.more_body and message["type"] == "http.response.start":
                # The rest of the body is not received.
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            return sends(message)

        cycle.send = send  # type: ignore[method-assign]

    def _check_headers(self) -> int:
        """The declared length. Headers with two interpretations are refused (request smuggling)."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(f"this is HTTP/{version}; send HTTP/1.1", 505)
        if self.parser.should_upgrade():
            self._stop("the connection cannot become another protocol's; send HTTP/1.1 without an Upgrade header")
        if not self.url.startswith(b"/"):
            self._stop("the request's target is no path; ask for one that begins with /")
        named = [name for name, _ in self.headers]
        if named.count(b"host") != 1:
            self._stop(f"there are {named.count(b'host')} Host headers; send one")
        length = 0
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding" and (value.lower().strip() != b"chunked" or version == "1.0"):
                self._stop("the only Transfer-Encoding is chunked, in HTTP/1.1; send that, or a Content-Length")
        return length

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self._body > self._most_bytes:
            self._stop(self._too_long, 413)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._phase == "body":
            self._enter("answer")

    def on_response_complete(self) -> None:
        if self._phase == "body":
            self._linger()
        elif self._phase == "answer":
            self._enter("idle")
        super().on_response_complete()

    @property
    def _most_bytes(self) -> int:
        """Of the body."""
        limits = self._limits
        return max(limits.body_bytes, limits.upload_bytes if self.url.partition(b"?")[0] in UPLOADS else 0)

    @property
    def _too_long(self) -> str:
        option = "--max-body-mb" if self._most_bytes == self._limits.body_bytes else "--max-state-mb"
        limit = self._most_bytes / (1 << 20)
        return f"the body is longer than {limit:g} MiB; shorten it, or serve with a larger {option}"

    def _enter(self, phase: str) -> None:
        self._phase, self._since = phase, time.monotonic()
        if phase == "idle":
            self._overhead, self._body, self._begun = 0, 0, False

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _stop(self, message: str, status: int = 400) -> None:
        """Refuse from within a callback of the parser."""
        self._refuse(status, message)
        raise _RefusedError

    def _refuse(self, status: int, message: str, retry_after: int | None = None) -> None:
        """Send an error in place of the application's response, and close. A response that has started ends first."""
        if self._refused:
            return
        self._refused = True
        if self._phase == "answer":
            self.cycle.keep_alive = False
            return
        if self._phase == "body" and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # the application sees a disconnect, and what it still sends is dropped
            self.cycle.message_event.set()
        error = ApiError(status, message, retry_after=retry_after)
        body = json.dumps(error.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
            **error.headers,
        }
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self._linger()

    def _linger(self) -> None:
        self._refused = True
        self._enter("closing")
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def resume_writing(self) -> None:
        self._unsent_until = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Enforce the deadline of the current phase."""
        limits, waited = self._limits, now - self._since
        if self._is_stuck(now) or (self._phase == "closing" and waited > _LINGER):
            self.transport.abort()
        elif self.transport.is_closing():
            return
        elif self._phase == "headers" and waited > limits.header_seconds:
            if self._begun:
                self._refuse(
                    408, f"the headers were not whole within {limits.header_seconds:g} seconds (--header-seconds)"
                )
            else:
                self.transport.abort()
        elif self._phase == "body" and waited > limits.body_seconds + self._body / limits.rate:
            self._refuse(
                408,
                f"the body came too slowly: {self._body} bytes in {waited:.0f} seconds (--body-seconds, --min-rate)",
            )
        elif self._half_closed and self._is_reset():
            self.transport.abort()
        elif self._half_closed and now > self._probe_at and not self.cycle.response_started:
            self._probe_after = min(2 * self._probe_after, _MOST_PROBE)
            self._probe_at = now + self._probe_after
            if self.cycle.scope["http_version"] == "1.1":
                self.transport.write(_PROBE)

    def _is_reset(self) -> bool:
        """Whether the client has answered a probe with a reset, of which the transport, which does not read any more,
        would learn with the next probe."""
        connection = self.transport.get_extra_info("socket")
        return connection is not None and bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _is_stuck(self, now: float) -> bool:
        """Whether the client does not read what is written to it."""
        size = self.transport.get_write_buffer_size()
        if not size or not (self.flow.write_paused or self.transport.is_closing() or self._phase != "answer"):
            self._unsent_until = None
        elif self._unsent_until is None:
            self._unsent_until = now + self._limits.write_seconds + size / self._limits.rate
        return self._unsent_until is not None and now > self._unsent_until


def check_all(connections: Iterable[Any]) -> None:
    now = time.monotonic()
    for connection in list(connections):
        connection.check(now)
