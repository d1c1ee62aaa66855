"""`POST /v1/score`: a job for each prefix, and their scores as one response."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mambakit.serving.api import operations
from mambakit.serving.api.answers import Usage
from mambakit.serving.api.score import PreparedScores, answer, prepare
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.generation import DISCONNECTED, finish
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.messages import Continuation, TextOptions


@dataclass
class _Scores:
    """The scores of one request.

    Attributes:
        jobs: one for each prefix, all with ``inbox``.
    """

    prepared: PreparedScores
    inbox: Inbox
    jobs: list[Job]
    usage: Usage
    model: str

    async def whole(self) -> Response:
        """The response when all are there."""
        prefixes, found, ended = self.prepared.prefixes, dict[int, Continuation](), 0
        while ended < len(self.jobs):
            for index, piece in await self.inbox.take():
                found.update(zip(prefixes[index].places, piece.continuations, strict=False))
                if piece.finish_reason:
                    self.usage.count(index, 0, piece.cached_tokens)
                    ended += 1
        scores = [found[place] for place in range(len(found))]
        return JSONResponse(answer(self.model, scores, self.usage, self.prepared.log_probs))


def endpoints(services: Services) -> list[Endpoint]:
    async def score(request: Request) -> Response:
        try:
            services.dispatcher.require_ready()
            prepared = await services.read(request, prepare)
            inbox, share = Inbox(), services.owner(request)
            lengths = [len(prefix.ids + b"".join(prefix.continuations)) // 8 for prefix in prepared.prefixes]
            jobs = [
                Job(
                    inbox, index, prefix.ids, length, {}, 0, share=share,
                    options=TextOptions(continuations=prefix.continuations),
                )
                for index, (prefix, length) in enumerate(zip(prepared.prefixes, lengths, strict=True))
            ]  # fmt: skip
            scores = _Scores(prepared, inbox, jobs, Usage(lengths, caching=services.caching), services.name)
            grant = services.submit(request, jobs, sum(lengths))
        except ApiError as error:
            services.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
            raise
        except ClientDisconnect:
            return DISCONNECTED
        return await finish(services, request, scores, lambda ended: scores.whole(), grant)

    return [Endpoint(operations.SCORE_TEXTS, score)]
