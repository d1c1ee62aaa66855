"""An answer of the API that is not a text."""

from __future__ import annotations

from typing import Any

from mambakit.quoting import cut

MOST_CHARACTERS = 1000  # of a message, whatever it quotes


class ApiError(Exception):
    """An answer that is not a text, in OpenAI's shape.

    Args:
        status: of HTTP.
        message: value, limit and remedy.
        param: the field that it is about.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, cut(message, MOST_CHARACTERS), code
        self.param = None if param is None else cut(param)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
