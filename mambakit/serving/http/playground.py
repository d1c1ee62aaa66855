"""The page at `/`: its files, and what it must know of the model."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mambakit.errors import MambakitError
from mambakit.quoting import cut
from mambakit.serving.api import operations
from mambakit.serving.errors import ApiError
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.playground.about import about
from mambakit.serving.playground.files import PAGE, PageFile, read_files


def endpoints(services: Services, model: str) -> list[Endpoint]:
    """``model``: hub id, folder or file of the checkpoint."""
    files = read_files()
    known: dict[str, Any] = {}

    async def page(request: Request) -> Response:
        return _answer(request, files[PAGE])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise ApiError(404, f"the playground has no file {cut(name)!r}; it begins at /", code="not_found")
        return _answer(request, files[name])

    async def facts(_: Request) -> Response:
        if not services.intake.loaded.done():
            raise ApiError(503, "the tokenizer is being loaded; try again in a few seconds", retry_after=5)
        codec = services.intake.loaded.result()[1]
        if not known:
            try:
                known.update(await asyncio.to_thread(about, model))
            except (MambakitError, OSError) as error:
                raise ApiError(503, f"the model's configuration cannot be read: {error}", retry_after=5) from error
        return JSONResponse(
            known | {"id": services.name, "chat_template": codec.template is not None, "states": services.keeps_states}
        )

    return [
        Endpoint(operations.PAGE, page),
        Endpoint(operations.PAGE_MODEL, facts),  # before the files, whose path fits it, too
        Endpoint(operations.PAGE_FILE, file),
    ]


def _answer(request: Request, file: PageFile) -> Response:
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)
