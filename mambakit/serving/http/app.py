"""The application: the table of endpoints, behind what every request passes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mambakit.serving.errors import ApiError
from mambakit.serving.http import generation, models, playground, probes, scores, states, tokens
from mambakit.serving.http.access import Access
from mambakit.serving.http.refusals import bug, http_error, refusal
from mambakit.serving.http.request_ids import HEADER, RequestIds
from mambakit.serving.http.request_log import RequestLog
from mambakit.serving.http.routing import Endpoint, routes
from mambakit.serving.http.services import Services
from mambakit.serving.replicas.supervisor import Supervisor


def endpoints(services: Services, page_of: str | None = None) -> list[Endpoint]:
    """All endpoints, in the order of the OpenAPI document.

    Args:
        page_of: the checkpoint that the playground tells of; None: there is no playground.
    """
    found = [
        *generation.endpoints(services),
        *states.endpoints(services),
        *scores.endpoints(services),
        *tokens.endpoints(services),
        *models.endpoints(services),
        *probes.endpoints(services),
    ]
    if page_of is not None:
        found += playground.endpoints(services, page_of)
    return [*found, models.document_endpoint(services, found)]


def make_app(
    services: Services, supervisor: Supervisor, failed: Callable[[str], None], page_of: str | None = None
) -> ASGIApp:
    """The ASGI application.

    Args:
        services: what the endpoints call.
        supervisor: of the replicas, which start and stop with the application.
        failed: called with the reason where the tokenizer cannot be loaded.
        page_of: the checkpoint that the playground tells of; None: there is no playground.
    """
    intake, access, table = services.intake, services.access, endpoints(services, page_of)

    def report(loaded: Future) -> None:
        if not loaded.cancelled() and (error := loaded.exception()) is not None:
            failed(str(error))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        supervisor.start()
        intake.loaded.add_done_callback(report)
        intake.start()
        try:
            yield
        finally:
            intake.stop()
            await supervisor.stop()

    middleware = [Middleware(Access, rules=access)]
    if access.origins:  # the answer to browsers' preflight requests
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", HEADER], expose_headers=["Retry-After", HEADER],
            )
        )  # fmt: skip
    application = Starlette(
        routes=routes(table, access),
        exception_handlers={ApiError: refusal, HTTPException: http_error, Exception: bug},
        lifespan=lifespan,
        middleware=middleware,
    )
    return RequestLog(RequestIds(application))
