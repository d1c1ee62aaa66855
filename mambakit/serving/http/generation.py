"""`POST /v1/completions` and `POST /v1/chat/completions`: a request's texts from its body to the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mambakit.serving.api import chat, completions, operations
from mambakit.serving.api.answers import Answer, CompletionAnswer, Usage
from mambakit.serving.api.chat import PreparedChat
from mambakit.serving.api.chat_answers import ChatAnswer
from mambakit.serving.api.intake import Prepare
from mambakit.serving.api.prompts import Prepared, check_echo
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.kept import Keeping
from mambakit.serving.http.quotas import Grant
from mambakit.serving.http.request_log import note
from mambakit.serving.http.routing import Endpoint
from mambakit.serving.http.services import Services
from mambakit.serving.http.texts import PIECES_OF_WHOLE, EventStream, Texts, while_connected

_P = TypeVar("_P", bound=Prepared)
# With --log-prompts: so many tokens of so many of a request's prompts.
_SHOWN, _MOST_SHOWN = 1000, 8
DISCONNECTED = Response(status_code=499)  # what proxies log for a client that disconnected; it is never sent


def endpoints(services: Services) -> list[Endpoint]:
    async def complete(request: Request) -> Response:
        return await answer(services, request, completions.prepare, _completion, "completion")

    async def reply(request: Request) -> Response:
        return await answer(services, request, chat.prepare, _chat, "chat")

    return [Endpoint(operations.COMPLETE, complete), Endpoint(operations.CHAT_COMPLETE, reply)]


async def answer(
    services: Services,
    request: Request,
    prepare: Prepare[_P],
    shape: Callable[[Services, _P], Awaitable[Answer]],
    origin: str,
) -> Response:
    """The response to a request for texts.

    Args:
        prepare: reads its body.
        shape: makes the answer's shape.
        origin: of the states that its texts leave.
    """
    try:
        services.dispatcher.require_ready()  # cheap checks come before the body is read
        prepared = await services.read(request, prepare)
        owner = services.owner(request)
        keeping = Keeping(services, str(owner[0]), prepared.asked.keep, origin)
        with keeping.closed_on_error():
            await keeping.begin(prepared.asked.state, *_size(prepared))
            texts = _texts(services, prepared, await shape(services, prepared), owner, keeping)
            await _note_prompts(services, prepared, request)
            grant = services.submit(request, texts.jobs, texts.usage.prompt_tokens)
    except ApiError as error:
        services.metrics.requests.labels("", "rejected" if error.retry_after else "invalid").inc()
        raise
    except ClientDisconnect:
        return DISCONNECTED
    return await finish(
        services, request, texts, lambda ended: texts.stream(ended) if texts.asked.stream else texts.whole(), grant,
        keeping.close,
    )  # fmt: skip


def _size(prepared: Prepared) -> tuple[int, int]:
    """(number of texts, tokens of the longest at most)."""
    texts = len(prepared.prompts) * prepared.asked.best_of
    return texts, max(len(ids) for ids in prepared.prompts) // 8 + prepared.asked.max_tokens


async def _note_prompts(services: Services, prepared: Prepared, request: Request) -> None:
    """With --log-prompts, for the request's line in the log."""
    if services.logs.prompts:
        shown = [await services.intake.decode(ids[: 8 * _SHOWN]) for ids in prepared.prompts[:_MOST_SHOWN]]
        note(request.scope, prompts=shown)


async def finish(
    services: Services,
    request: Request,
    texts: Any,
    respond: Callable[[Callable[[], None]], Awaitable[Response]],
    grant: Grant,
    close: Callable[[], None] = lambda: None,
) -> Response:
    """The response of submitted jobs, while the client is there and the time of a request lasts.

    Args:
        texts: has ``jobs`` and their ``inbox``.
        respond: makes the response. It is given what an `EventStream` calls at its end.
        grant: that `Services.submit` gave for the jobs.
        close: called at the end, however it comes.
    """
    # Timed from here: until now the limits of the connection and of the intake applied.
    timeout = asyncio.get_running_loop().call_later(services.request_seconds, _expire, services, texts)

    def ended() -> None:
        timeout.cancel()
        services.dispatcher.cancel(texts.jobs)
        tokens = sum(job.tokens for job in texts.jobs)
        grant.end(tokens)
        note(request.scope, texts=len(texts.jobs), prompt_tokens=grant.prompt_tokens, tokens=tokens)
        close()

    try:
        # Nothing is sent before the first token: a replica that dies until then is an HTTP error.
        found = await while_connected(request.receive, respond(ended))
    except BaseException:
        ended()
        raise
    if not isinstance(found, EventStream):
        ended()
    return DISCONNECTED if found is None else found


def _expire(services: Services, texts: Any) -> None:
    limit = f"{services.request_seconds:g} seconds (--request-seconds)"
    texts.inbox.fail(ApiError(504, f"the request was not done within {limit}; ask for fewer tokens"))
    services.dispatcher.cancel(texts.jobs)


def _texts(services: Services, prepared: Prepared, answer: Answer, share: tuple[Any, ...], keeping: Keeping) -> Texts:
    asked = prepared.asked
    inbox = Inbox() if asked.stream else Inbox(PIECES_OF_WHOLE)
    lengths = [len(ids) // 8 for ids in prepared.prompts]
    jobs: list[Job] = []
    deadline = services.deadline(asked.deadline)
    for ids, length in zip(prepared.prompts, lengths, strict=True):
        for copy in range(asked.best_of):
            # The prompt is scored once for all of its texts, unless each goes out as it comes.
            options = replace(asked.options, state=keeping.task)
            if copy and not asked.stream:
                options = replace(options, prompt_log_probs=False)
            sampling = asked.sampling_of(copy)
            jobs.append(
                Job(
                    inbox,
                    len(jobs),
                    ids,
                    length,
                    sampling,
                    asked.max_tokens,
                    asked.stop,
                    copy,
                    share,
                    options,
                    asked.priority,
                    deadline,
                )
            )
    usage = Usage(lengths, asked.best_of, caching=services.caching)

    def offsets(tokens: Sequence[int]) -> list[int]:
        return services.token_texts.offsets(tokens)

    return Texts(asked, answer, inbox, jobs, usage, offsets, keeping)


async def _completion(services: Services, prepared: Prepared) -> Answer:
    asked, echoed = prepared.asked, []
    for ids, text in zip(prepared.prompts, prepared.texts, strict=True):
        before = ""
        if asked.echo:
            before = await services.intake.decode(ids) if text is None else text
            check_echo(asked.n * len(before))
        echoed += [before] * asked.n
    texts = services.token_texts if asked.shows_log_probs else None
    return CompletionAnswer(services.name, echoed, texts, asked.include_usage, asked.metadata)


async def _chat(services: Services, prepared: PreparedChat) -> Answer:
    asked = prepared.asked
    texts = services.token_texts if asked.shows_log_probs else None
    return ChatAnswer(services.name, prepared.form, asked.stream, texts, asked.include_usage, asked.metadata)
