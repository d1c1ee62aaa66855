"""The model's name, and the OpenAPI document of the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mambakit import __version__
from mambakit.quoting import cut, quoted
from mambakit.serving.api import operations
from mambakit.serving.api.openapi import document
from mambakit.serving.errors import ApiError
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services


def endpoints(services: Services) -> list[Endpoint]:
    def body() -> dict[str, Any]:
        return {"id": services.name, "object": "model", "created": services.started, "owned_by": "mambakit"}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [body()]})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != services.name:
            message = f"there is no model {quoted(name)}; this server has {cut(services.name)!r} alone"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(body())

    return [Endpoint(operations.LIST_MODELS, models), Endpoint(operations.SHOW_MODEL, model)]


def document_endpoint(services: Services, others: Sequence[Endpoint]) -> Endpoint:
    """The OpenAPI document of these endpoints and itself."""

    async def show(_: Request) -> Response:
        if not services.intake.loaded.done():
            raise ApiError(503, "the tokenizer is being loaded; try again in a few seconds", retry_after=5)
        limits = services.intake.loaded.result()[2]
        declared = [*(endpoint.operation for endpoint in others), operations.DOCUMENT]
        return JSONResponse(document(declared, limits, __version__, keys=bool(services.access.keys)))

    return Endpoint(operations.DOCUMENT, show)
