"""One text of a request (a job), the inbox where its request reads the output, and a replica as dispatch sees it."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import time
from dataclasses import dataclass, field
from typing import Any

from mambakit.serving.dispatch.shares import Shares
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Piece, TextOptions

# Prefill reads chunks: a prompt token costs about this fraction of a generated one.
PROMPT_COST = 1 / 16


class Inbox:
    """The pieces of one request's texts; all that arrived since the last `take` is returned together.

    Args:
        least: pieces that `take` waits for, unless a text ends or an error comes before: a reader that can do nothing
            with a part of a text is not woken for each.
    """

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._pieces: list[tuple[int, Piece]] = []
        self._error: ApiError | None = None
        self._due = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, index: int, piece: Piece) -> None:
        self._pieces.append((index, piece))
        if piece.finish_reason or len(self._pieces) >= self._least:
            self._wake()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._due = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[tuple[int, Piece]]:
        """(index of the text, its piece), at least one; after the last of them the error is raised. One reader calls
        it."""
        if not self._due:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        pieces, self._pieces = self._pieces, []
        if not pieces:
            assert self._error is not None
            raise self._error
        self._due = self._error is not None
        return pieces


@dataclass(eq=False)
class Replica:
    """A replica as dispatch sees it."""

    number: int
    device: str
    state: str = "loading"
    """"loading", "ready", "silent" while its heartbeat is late, or "dead" until it is restarted; where the number of
    replicas changes also "draining" (it gets no more texts) and "asleep" (it does not run)."""
    jobs: dict[int, Job] = field(default_factory=dict)
    """The texts that it has, by `Job.id`, in the order in which they were sent."""
    shares: Shares = field(default_factory=Shares)
    """The owners of those texts."""
    work: float = 0.0
    """What is left of those texts, at most, in generated tokens."""
    busy: int = 0
    waiting: int = 0
    restarts: int = 0
    began: float = 0.0
    """When its process was started, or is to be."""
    load_seconds: float | None = None
    """How long its last start took."""
    error: str = ""
    """The reason of its last death."""
    pid: int | None = None
    outgoing: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    """Messages to its process."""

    def add(self, job: Job) -> None:
        job.replica, self.jobs[job.id] = self, job
        self.shares.add(job.share)
        self.work += job.remaining

    def remove(self, job: Job) -> None:
        del self.jobs[job.id]
        self.shares.remove(job.share)
        self.work = self.work - job.remaining if self.jobs else 0.0

    def wrote(self, job: Job, tokens: int) -> float:
        """Count new tokens of one of its texts. Returns the work that they were, with the first that of the prompt."""
        work = tokens + (0.0 if job.tokens else job.prompt_tokens * PROMPT_COST)  # so much less is `Job.remaining`
        job.tokens += tokens
        self.work -= work
        return work

    @property
    def name(self) -> str:
        return f"replica {self.number} ({self.device})"


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
    """Its number among the n texts of its prompt; the prompt's tokens are counted with copy 0."""
    share: tuple[Any, ...] = ()
    """Its owner, from the outside in: (key, client, request)."""
    options: TextOptions = field(default_factory=TextOptions)
    priority: int = 0
    """Among the texts of its key: the smaller, the earlier."""
    deadline: float = math.inf
    """When it is of no use any more, by the dispatcher's clock."""

    id: int = field(default_factory=itertools.count().__next__, init=False)
    request_id: str = field(default="", init=False)
    """Of its request, for the log."""
    created: float = field(default_factory=time.monotonic, init=False)
    first: float = field(default=0.0, init=False)
    """When its first token came."""
    tokens: int = field(default=0, init=False)
    replica: Replica | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)
    """Finished, failed or cancelled: its inbox gets nothing more."""

    @property
    def work(self) -> int:
        """A hash of all that is asked except the seed: equal for two requests of the same work."""
        sampling = repr([(name, value) for name, value in self.sampling.items() if name != "seed"])
        return hash((self.prompt_ids, sampling, self.max_new_tokens, self.stop, self.options))

    @property
    def remaining(self) -> float:
        """An upper bound of the work that is left, in generated tokens."""
        return self.max_new_tokens - self.tokens + (0 if self.tokens else self.prompt_tokens * PROMPT_COST)
