"""Probes: whether the server runs, whether it is ready, how its replicas are, and its metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mambakit.serving.api import operations
from mambakit.serving.errors import ApiError
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services


def endpoints(services: Services) -> list[Endpoint]:
    dispatcher, loaded = services.dispatcher, services.intake.loaded

    async def health(_: Request) -> Response:
        found = dispatcher.health()
        if found["status"] in ("ok", "degraded") and not loaded.done():
            found["status"] = "loading"
        return JSONResponse(found, 200 if found["status"] in ("ok", "degraded") else 503)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        dispatcher.require_ready()
        if not loaded.done():
            raise ApiError(503, "the tokenizer is being loaded; try again in a few seconds", retry_after=5)
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        dispatcher.measure()
        if services.states is not None:
            services.metrics.set_states(services.states.by_owner())
        return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Endpoint(operations.HEALTH, health),
        Endpoint(operations.LIVE, live),
        Endpoint(operations.READY, ready),
        Endpoint(operations.LIVEZ, live),
        Endpoint(operations.READYZ, ready),
        Endpoint(operations.METRICS, metrics),
    ]
