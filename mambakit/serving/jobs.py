"""A text on its way through the front, and where its request hears of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mambakit.serving.messages import Piece
from mambakit.serving.protocol import ApiError

if TYPE_CHECKING:
    from mambakit.serving.router import Replica

# A prompt is read in chunks, which makes a token of it cost about this share of one that is written.
_PROMPT_SHARE = 1 / 16


class Inbox:
    """What one request's texts have gained; whatever piles up while its reader is busy is taken together."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Piece]] = []
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    def put(self, index: int, piece: Piece) -> None:
        self._pieces.append((index, piece))
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._changed.set()

    async def take(self) -> list[tuple[int, Piece]]:
        """(the text's index, what it gained), at least one; raises the error after the last of them."""
        await self._changed.wait()
        pieces, self._pieces = self._pieces, []
        if not pieces:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._changed.clear()
        return pieces


@dataclass(eq=False)
class Job:
    """One text of a request."""

    inbox: Inbox
    index: int
    prompt_ids: bytes
    prompt_tokens: int
    sampling: dict[str, Any]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    copy: int = 0
    """Which of the n texts after its prompt it is; the prompt is counted with the first."""
    share: tuple[Any, ...] = ()
    """Whose it is, from the outside in: (key, client, request)."""

    id: int = field(default_factory=itertools.count().__next__, init=False)
    created: float = field(default_factory=time.monotonic, init=False)
    first: float = field(default=0.0, init=False)
    tokens: int = field(default=0, init=False)
    replica: Replica | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)
    """Nobody waits for it any more."""

    @property
    def work(self) -> int:
        """A number that is the same for every text that asks for the same, whatever its seed."""
        sampling = tuple((name, value) for name, value in self.sampling.items() if name != "seed")
        return hash((self.prompt_ids, sampling, self.max_new_tokens, self.stop))

    @property
    def left(self) -> float:
        """What there is to do at most, in tokens."""
        return self.max_new_tokens - self.tokens + (0 if self.tokens else self.prompt_tokens * _PROMPT_SHARE)
