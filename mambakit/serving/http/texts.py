"""One accepted request: the pieces of its texts as one JSON response or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mambakit.serving.api.answers import DONE, Answer, Usage, event
from mambakit.serving.api.asked import Asked
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Piece

_T = TypeVar("_T")


@dataclass
class Completion:
    """
    Attributes:
        jobs: its texts, all with ``inbox``.
        echoed: for each text, what precedes it with `echo`.
    """

    asked: Asked
    answer: Answer
    inbox: Inbox
    jobs: list[Job]
    usage: Usage
    echoed: list[str]

    @property
    def most_tokens(self) -> int:
        """Of its prompts, each of which is read once, and of all that its texts may have."""
        return self.usage.prompt_tokens + sum(job.max_new_tokens for job in self.jobs)

    def _count(self, index: int, piece: Piece) -> None:
        self.usage.count(index, piece.tokens, piece.cached_tokens if piece.finish_reason else None)

    async def whole(self) -> Response:
        """The response when all texts have ended."""
        texts: list[list[str]] = [[before] for before in self.echoed]
        reasons = [""] * len(texts)
        while not all(reasons):
            for index, piece in await self.inbox.take():
                texts[index].append(piece.text)
                reasons[index] = piece.finish_reason
                self._count(index, piece)
        joined = ["".join(parts) for parts in texts]
        return JSONResponse(self.answer.whole(zip(joined, reasons, strict=True), self.usage))

    async def stream(self, ended: Callable[[], None]) -> EventStream:
        """The response as events, once the first token is there; until then an error is an HTTP error."""
        return EventStream(self._events(await self.inbox.take()), ended)

    async def _events(self, pieces: list[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        with_usage = self.asked.include_usage
        left = len(self.jobs)
        yield b"".join(self.answer.event(i, text, "", with_usage) for i, text in enumerate(self.echoed) if text)
        try:
            while True:
                gained: dict[int, tuple[str, str]] = {}
                for index, piece in pieces:
                    self._count(index, piece)
                    gained[index] = (gained.get(index, ("", ""))[0] + piece.text, piece.finish_reason)
                left -= sum(bool(reason) for _, reason in gained.values())
                yield b"".join(
                    self.answer.event(index, text, reason, with_usage)
                    for index, (text, reason) in gained.items()
                    if text or reason
                )
                if not left:
                    break
                pieces = await self.inbox.take()
        except ApiError as error:
            yield event(error.body)
            return
        if with_usage:
            yield self.answer.usage_event(self.usage)
        yield DONE


class EventStream(StreamingResponse):
    """Server-sent events; ``ended`` is called however the stream ends."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer them
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def while_connected(request: Request, answer: Awaitable[_T]) -> _T | None:
    """The answer, or None where the client disconnects first."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(answer), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
