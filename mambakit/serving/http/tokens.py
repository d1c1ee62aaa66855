"""`POST /tokenize` and `POST /detokenize`. They need no replica."""

from __future__ import annotations

from array import array
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mambakit.serving.api import operations
from mambakit.serving.api.tokens import token_ids, tokenise
from mambakit.serving.http.generation import DISCONNECTED
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services


def endpoints(services: Services) -> list[Endpoint]:
    async def tokenize(request: Request) -> Response:
        try:
            found = await services.read(request, tokenise)
        except ClientDisconnect:
            return DISCONNECTED
        limits = services.intake.loaded.result()[2]
        body: dict[str, Any] = {
            "tokens": found.ids, "count": len(found.ids), "max_model_len": limits.max_prompt_tokens,
        }  # fmt: skip
        if found.with_texts:
            body["token_strs"] = [services.token_texts.text(token) for token in found.ids]
        return JSONResponse(body)

    async def detokenize(request: Request) -> Response:
        try:
            ids = await services.read(request, token_ids)
        except ClientDisconnect:
            return DISCONNECTED
        return JSONResponse({"prompt": await services.intake.decode(array("q", ids).tobytes())})

    return [Endpoint(operations.TOKENIZE_TEXT, tokenize), Endpoint(operations.DETOKENIZE_TOKENS, detokenize)]
