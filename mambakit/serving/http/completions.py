"""`POST /v1/completions`: a request's texts from its body to the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mambakit.serving.api import operations
from mambakit.serving.api.answers import Answer, Usage
from mambakit.serving.api.completions import prepare
from mambakit.serving.api.prompts import Prepared, check_echo
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.request_log import note
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.http.texts import Completion, EventStream, while_connected

_DISCONNECTED = Response(status_code=499)  # what proxies log for a client that disconnected; it is never sent

# With --log-prompts: so many tokens of so many of a request's prompts.
_SHOWN, _MOST_SHOWN = 1000, 8


def endpoints(services: Services) -> list[Endpoint]:
    async def complete(request: Request) -> Response:
        return await answer(services, request)

    return [Endpoint(operations.COMPLETE, complete)]


async def answer(services: Services, request: Request) -> Response:
    """The response to a request for texts."""
    try:
        services.dispatcher.require_ready()  # cheap checks come before the body is read
        prepared = await services.read(request, prepare)
        completion = await _completion(services, prepared, request)
        grant = services.admit(request, len(completion.jobs), completion.most_tokens)
        try:
            services.dispatcher.submit(completion.jobs)
        except ApiError:
            grant.end(0)
            raise
    except ApiError as error:
        services.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
        raise
    except ClientDisconnect:
        return _DISCONNECTED
    # Timed from here: until now the limits of the connection and of the intake applied.
    timeout = asyncio.get_running_loop().call_later(services.request_seconds, _expire, services, completion)

    def ended() -> None:
        timeout.cancel()
        services.dispatcher.cancel(completion.jobs)
        grant.end(completion.usage.prompt_tokens + completion.usage.completion_tokens)
        counts = {"prompt_tokens": completion.usage.prompt_tokens, "tokens": completion.usage.completion_tokens}
        note(request.scope, texts=len(completion.jobs), **counts)

    response: Awaitable[Response] = completion.stream(ended) if completion.asked.stream else completion.whole()
    try:
        # Nothing is sent before the first token: a replica that dies until then is an HTTP error.
        found = await while_connected(request, response)
    except BaseException:
        ended()
        raise
    if not isinstance(found, EventStream):
        ended()
    return _DISCONNECTED if found is None else found


def _expire(services: Services, completion: Completion) -> None:
    limit = f"{services.request_seconds:g} seconds (--request-seconds)"
    completion.inbox.fail(ApiError(504, f"the request was not done within {limit}; ask for fewer tokens"))
    services.dispatcher.cancel(completion.jobs)


async def _completion(services: Services, prepared: Prepared, request: Request) -> Completion:
    asked, inbox, share = prepared.asked, Inbox(), services.owner(request)
    lengths: list[int] = []
    jobs: list[Job] = []
    echoed: list[str] = []
    for ids, text in zip(prepared.prompts, prepared.texts, strict=True):
        length = len(ids) // 8
        lengths.append(length)
        before = ""
        if asked.echo:
            before = await services.intake.decode(ids) if text is None else text
            check_echo(asked.n * len(before))
        for copy in range(asked.n):
            sampling = asked.sampling_of(copy)
            jobs.append(Job(inbox, len(jobs), ids, length, sampling, asked.max_tokens, asked.stop, copy, share))
            echoed.append(before)
    if services.logs.prompts:
        shown = [await services.intake.decode(ids[: 8 * _SHOWN]) for ids in prepared.prompts[:_MOST_SHOWN]]
        note(request.scope, prompts=shown)
    usage = Usage(lengths, asked.n, caching=services.caching)
    return Completion(asked, Answer(services.name), inbox, jobs, usage, echoed)
