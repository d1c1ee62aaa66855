"""Texts that one engine decodes together, each as an iterator over pieces of text like `Stream`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mambakit.errors import LogitsError
from mambakit.generation.engine import Engine
from mambakit.generation.request import Request
from mambakit.generation.stream import StoppingDecoder
from mambakit.modules import StateCache


class EngineStream:
    """One text. Reading its pieces advances all texts of the engine. Made by `stream_together`.

    Attributes:
        text, tokens: of the text so far.
    """

    def __init__(self, engine: Engine, streams: dict[Request, EngineStream], request: Request, shown: StoppingDecoder):
        self._engine, self._streams, self._request, self._shown = engine, streams, request, shown
        self._pieces: deque[str] = deque()
        self._over = False
        self.text = ""
        self.tokens: list[int] = []

    @property
    def finish_reason(self) -> str:
        """ "stop" (end-of-text or a stop string) or "length"."""
        return "stop" if self._shown.stopped else self._request.finish_reason

    @property
    def cache(self) -> StateCache | None:
        """The state it ended in, where the request keeps it."""
        return self._request.final_state

    def __iter__(self) -> Iterator[str]:
        while self._pieces or not self._over:
            while self._pieces:
                piece = self._pieces.popleft()
                self.text += piece
                yield piece
            if not self._over:
                self._step()
        if self._request.error:
            raise self._request.exception or LogitsError(self._request.error)

    def _step(self) -> None:
        ended = [stream for request, stream in self._streams.items() if request.finish_reason]
        for request, token in self._engine.step():
            self._streams[request]._take(token)
        for request, stream in self._streams.items():
            # A cancelled text ends at the next step, which keeps its state.
            if stream in ended or (request.finish_reason and request.finish_reason != "cancelled"):
                stream._end()

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        if piece := self._shown.push(token):
            self._pieces.append(piece)
        if self._shown.stopped:
            self._request.cancel()

    def _end(self) -> None:
        if not self._over and (rest := self._shown.rest()):
            self._pieces.append(rest)
        self._over = True


def stream_together(
    engine: Engine, tokenizer: Any, requests: Sequence[Request], stop: tuple[str, ...] = ()
) -> list[EngineStream]:
    """Submit ``requests`` to an engine that has no others. Returns a stream for each."""
    streams: dict[Request, EngineStream] = {}
    for request in requests:
        streams[engine.submit(request)] = EngineStream(engine, streams, request, StoppingDecoder(tokenizer, stop))
    return list(streams.values())
