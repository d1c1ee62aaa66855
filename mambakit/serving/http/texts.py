"""One accepted request: the pieces of its texts as one JSON response or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mambakit.serving.api.answers import DONE, Answer, Choice, Usage, event
from mambakit.serving.api.asked import Asked
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.kept import Keeping
from mambakit.serving.http.request_log import sender_of_parts
from mambakit.serving.messages import Kept, Piece, Scored

_T = TypeVar("_T")
# Log-probabilities, alternatives included, that become JSON on the event loop at a time: some 10 ms, in which no other
# client is served. A whole answer of more is written by a thread; in a stream others take turns between so many.
MANY = 1024
# Pieces of a whole answer that are read at a time: they need nobody before its end, and are not to pile up.
PIECES_OF_WHOLE = 64


@dataclass
class _Written:
    """A text so far."""

    parts: list[str] = field(default_factory=list)
    log_probs: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored, ...] = ()
    finish_reason: str = ""
    kept: Kept | None = None

    def add(self, piece: Piece) -> None:
        self.parts.append(piece.text)
        self.log_probs += piece.log_probs
        self.prompt = self.prompt or piece.prompt_log_probs
        self.finish_reason, self.kept = piece.finish_reason, piece.kept

    @property
    def mean_log_prob(self) -> float:
        """Of a token; the best of several texts of a prompt has the largest."""
        return sum(one.log_prob or 0.0 for one in self.log_probs) / max(1, len(self.log_probs))


@dataclass
class Texts:
    """The texts of one request.

    Attributes:
        jobs: one for each, all with ``inbox``: `Asked.best_of` for each prompt.
        offsets: the number of characters before each of a prompt's tokens.
        keeping: the states that they start from and leave.
    """

    asked: Asked
    answer: Answer
    inbox: Inbox
    jobs: list[Job]
    usage: Usage
    offsets: Callable[[Sequence[int]], list[int]]
    keeping: Keeping

    async def whole(self) -> Response:
        """The response when all texts have ended."""
        texts = [_Written() for _ in self.jobs]
        while not all(text.finish_reason for text in texts):
            for index, piece in await self.inbox.take():
                texts[index].add(piece)
                self.usage.count(index, piece.tokens, piece.cached_tokens if piece.finish_reason else None)
        chosen = self._chosen(texts)
        states = [await self.keeping.acknowledge(text.kept) for text in chosen]
        if sum(_numbers(text.log_probs) + _numbers(text.prompt) for text in chosen) > MANY:
            return await asyncio.to_thread(self._response, chosen, states)
        return self._response(chosen, states)

    def _response(self, texts: Sequence[_Written], states: Sequence[dict[str, Any] | None]) -> Response:
        shown = self.asked.shows_log_probs
        choices = [
            Choice(
                index, "".join(text.parts), text.finish_reason, text.log_probs if shown else (), text.prompt,
                self._offsets(text.prompt), state,
            )
            for index, (text, state) in enumerate(zip(texts, states, strict=True))
        ]  # fmt: skip
        return _ChoicesResponse(self.answer.whole(choices, self.usage))

    def _chosen(self, texts: list[_Written]) -> list[_Written]:
        """The n best of each prompt's texts, all with the prompt's log-probabilities."""
        n, best_of, chosen = self.asked.n, self.asked.best_of, []
        for first in range(0, len(texts), best_of):
            group = texts[first : first + best_of]
            prompt = group[0].prompt  # only the first text has read it for them
            if n < best_of:
                group = sorted(group, key=lambda text: -text.mean_log_prob)[:n]
            for text in group:
                text.prompt = prompt
            chosen += group
        return chosen

    def _offsets(self, prompt: Sequence[Scored]) -> list[int]:
        return self.offsets([one.token for one in prompt]) if prompt else []

    async def stream(self, ended: Callable[[], None]) -> EventStream:
        """The response as events, once the first token is there; until then an error is an HTTP error."""
        return EventStream(self._events(await self.inbox.take()), ended)

    async def _events(self, pieces: list[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        left, answer = len(self.jobs), self.answer
        waits = self.asked.options.prompt_log_probs  # a text begins with its prompt's log-probabilities
        if not waits:
            yield b"".join(answer.begin(Choice(index)) for index in range(left))
        try:
            while True:
                for turn, some in enumerate(_turns(pieces)):
                    if turn:
                        await asyncio.sleep(0)
                    gained: dict[int, Choice] = {}
                    for index, piece in some:
                        self.usage.count(index, piece.tokens, piece.cached_tokens if piece.finish_reason else None)
                        if piece.prompt_log_probs:
                            yield await asyncio.to_thread(self._begin, index, piece.prompt_log_probs)
                        if (one := gained.get(index)) is None:
                            one = gained[index] = Choice(index)
                        one.text, one.finish_reason = one.text + piece.text, piece.finish_reason
                        if piece.kept is not None:
                            one.state = await self.keeping.acknowledge(piece.kept)
                        if piece.log_probs and self.asked.shows_log_probs:
                            one.log_probs = [*one.log_probs, *piece.log_probs]
                    left -= sum(bool(one.finish_reason) for one in gained.values())
                    events = b"".join(map(answer.gain, gained.values()))
                    if left:
                        yield events
                if not left:
                    break
                pieces = await self.inbox.take()
        except ApiError as error:
            yield event(error.body)
            return
        yield events + (answer.usage_event(self.usage) if self.asked.include_usage else b"") + DONE

    def _begin(self, index: int, prompt: Sequence[Scored]) -> bytes:
        return self.answer.begin(Choice(index, prompt=prompt, offsets=self._offsets(prompt)))


def _numbers(scored: Sequence[Scored]) -> int:
    """Log-probabilities, those of alternatives included: every token has as many, but a prompt's first."""
    return len(scored) * (1 + len(scored[-1].top)) if scored else 0


def _turns(pieces: list[tuple[int, Piece]]) -> list[list[tuple[int, Piece]]]:
    """The pieces, in turns of about `MANY` log-probabilities: they pile up behind a client that reads slowly."""
    turns: list[list[tuple[int, Piece]]] = []
    numbers = MANY
    for index, piece in pieces:
        if numbers >= MANY:
            turns.append([])
            numbers = 0
        turns[-1].append((index, piece))
        if piece.log_probs:
            numbers += _numbers(piece.log_probs)
    return turns


class _ChoicesResponse(JSONResponse):
    """JSON whose choices are written one at a time: the encoder holds the interpreter's lock until it is done."""

    def render(self, content: Any) -> bytes:
        def part(name: str, value: Any) -> bytes:
            if name != "choices":
                return JSONResponse.render(self, value)
            return b"[" + b",".join(JSONResponse.render(self, choice) for choice in value) + b"]"

        named = (JSONResponse.render(self, name) + b":" + part(name, value) for name, value in content.items())
        return b"{" + b",".join(named) + b"}"


class EventStream(StreamingResponse):
    """Server-sent events; ``ended`` is called however the stream ends."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer them
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send, sender_of_parts(scope)))
        finally:
            self._ended()

    async def _send(self, send: Send, send_part: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        more = True
        async for events in self._events:
            more = not events.endswith(DONE)  # the end of the body goes out with the last event
            if events:
                await send_part({"type": "http.response.body", "body": events, "more_body": more})
        if more:
            await send_part({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, answer: Awaitable[_T]) -> _T | None:
    """The answer, or None where the client disconnects first."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(answer), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
