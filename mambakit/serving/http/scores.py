"""`POST /v1/score`: a job for each prefix, and their scores as one response."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mambakit.serving.api import operations
from mambakit.serving.api.answers import Usage
from mambakit.serving.api.score import PreparedScores, answer, prepare
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.generation import DISCONNECTED, finish
from mambakit.serving.http.kept import Keeping
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.messages import Continuation, Scored, StateTask, TextOptions


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
    keeping: Keeping

    async def whole(self) -> Response:
        """The response when all are there."""
        prefixes, found, ended, state = self.prepared.prefixes, dict[int, Continuation](), 0, None
        while ended < len(self.jobs):
            for index, piece in await self.inbox.take():
                found.update(zip(prefixes[index].places, piece.continuations, strict=False))
                if piece.prompt_log_probs:
                    found[0] = _of_piece(piece.prompt_log_probs, prefixes[index].continuations[0])
                if piece.finish_reason:
                    state = await self.keeping.acknowledge(piece.kept)
                    self.usage.count(index, 0, piece.cached_tokens)
                    ended += 1
        scores = [found[place] for place in range(len(found))]
        return JSONResponse(answer(self.model, scores, self.usage, self.prepared.log_probs, state))


def _of_piece(scored: Sequence[Scored], continuation: bytes) -> Continuation:
    """The score of the last tokens of a prompt that was scored with the likeliest token at each place."""
    last = scored[-(len(continuation) // 8) :]
    if last[0].log_prob is None:
        raise ApiError(400, "nothing comes before the first token that is to be scored; give a prompt", param="prompt")
    values = array("f", [one.log_prob or 0.0 for one in last])
    return Continuation(values.tobytes(), all(one.top[0][0] == one.token for one in last))


def _job(prepared: PreparedScores, index: int, inbox: Inbox, share: Any, task: StateTask | None, end: float) -> Job:
    prefix = prepared.prefixes[index]
    length = len(prefix.ids + b"".join(prefix.continuations)) // 8
    options = TextOptions(continuations=prefix.continuations, state=task, cache_salt=prepared.cache_salt)
    ids = prefix.ids
    if prepared.keep is not None:  # the continuation is read, too, so that the state is the one after it
        ids += prefix.continuations[0]
        options = replace(options, continuations=None, prompt_log_probs=True, log_probs=1)
    return Job(inbox, index, ids, length, {}, 0, share=share, options=options, priority=prepared.priority, deadline=end)


def endpoints(services: Services) -> list[Endpoint]:
    async def score(request: Request) -> Response:
        try:
            services.dispatcher.require_ready()
            prepared = await services.read(request, prepare)
            inbox, share = Inbox(), services.owner(request)
            keeping = Keeping(services, str(share[0]), prepared.keep, "score")
            with keeping.closed_on_error():
                await keeping.begin(prepared.state, 1, max(len(prefix.ids) for prefix in prepared.prefixes) // 8)
                end, task = services.deadline(prepared.deadline), keeping.task
                jobs = [_job(prepared, index, inbox, share, task, end) for index in range(len(prepared.prefixes))]
                lengths = [job.prompt_tokens for job in jobs]
                usage = Usage(lengths, caching=services.caching)
                scores = _Scores(prepared, inbox, jobs, usage, services.name, keeping)
                grant = services.submit(request, jobs, sum(lengths))
        except ApiError as error:
            services.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
            raise
        except ClientDisconnect:
            return DISCONNECTED
        return await finish(services, request, scores, lambda ended: scores.whole(), grant, keeping.close)

    return [Endpoint(operations.SCORE_TEXTS, score)]
