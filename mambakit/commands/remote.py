"""A client of a server's API, of the standard library alone."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from mambakit.errors import UsageError
from mambakit.quoting import brief, cut


class RemoteError(UsageError):
    """The server refused a request.

    Attributes:
        status: of HTTP; 0 where the error came in the middle of a stream.
        code: of the error, as the API names it; "" without one.
    """

    def __init__(self, message: str, status: int = 0, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Remote:
    """
    Args:
        url: of the server, with or without the path ``/v1``.
        key: its API key.

    Raises:
        UsageError: the URL is none.
    """

    def __init__(self, url: str, key: str | None = None, seconds: float = 600.0):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError(f"--server {brief(url)}: {error}; give a URL as http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--server is {brief(url)}; give a URL as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._parts, self._port, self._key, self._seconds = parts, port, key, seconds
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")

    def model(self) -> str:
        """The name of the server's model."""
        found = json.loads(self._ask("GET", "/v1/models").read())
        return str(found["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer.

        Raises:
            RemoteError: the server refused the request, or could not end it.
            UsageError: it cannot be reached.
        """
        response = self._ask("POST", path, {name: v for name, v in body.items() if v is not None} | {"stream": True})
        done = False
        try:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _error(event, 0, self.url)
                yield event
            if not done:
                raise RemoteError(f"{self.url} closed the connection in the middle of the text; send it again")
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"{self.url} was lost in the middle of the text ({error}); send it again") from error
        finally:
            response.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        host = self._parts.hostname
        assert host is not None
        headers = {"Accept": "application/json, text/event-stream", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, self._port, timeout=self._seconds, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, self._port, timeout=self._seconds)
        try:
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UsageError(f"{self.url} cannot be reached ({error}); is `mambakit serve` running there?") from error
        if response.status != 200:
            raise _error(_parsed(response.read()), response.status, self.url)
        return response


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return {}


def _error(body: Any, status: int, url: str) -> RemoteError:
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    message = cut(str(error.get("message") or f"status {status}"), 600)
    if status == 401:
        message += " (--api-key KEY, or $MAMBAKIT_API_KEY)"
    return RemoteError(f"{url}: {message}", status, str(error.get("code") or ""))
