"""Checks of a request's headers, and errors as responses."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mambakit.quoting import cut
from mambakit.serving.errors import ApiError


def require_json(request: Request) -> None:
    """Raises an `ApiError` for another content type: browsers send those to any server without a preflight request."""
    sent = request.headers.get("content-type")
    kind = (sent or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        what = "the body has no Content-Type" if sent is None else f"the body's Content-Type is {cut(sent)!r}"
        raise ApiError(400 if sent is None else 415, f"{what}; send JSON as Content-Type: application/json")
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(415, f"the body's Content-Encoding is {cut(coding)!r}; send it as it is")


async def refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{cut(request.method)} {cut(request.url.path)}: {error.detail}; GET /openapi.json lists what is served"
    code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
    return JSONResponse(ApiError(error.status_code, what, code=code).body, error.status_code, error.headers)


async def bug(_: Request, error: Exception) -> Response:
    message = f"the server failed on this request ({type(error).__name__}); its log says more"
    # The connection is closed after the exception: a client that used it again would be reset.
    return JSONResponse(ApiError(500, message).body, 500, {"Connection": "close"})
