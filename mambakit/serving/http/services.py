"""What endpoints are made of: the parts of the server that they call."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.intake import Intake, Prepare
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.quotas import Grant, Quotas
from mambakit.serving.http.refusals import require_json
from mambakit.serving.http.request_ids import request_id
from mambakit.serving.http.routing import key_of
from mambakit.serving.logs import LogOptions
from mambakit.serving.messages import Layout
from mambakit.serving.metrics import Metrics
from mambakit.serving.states.store import StateStore
from mambakit.serving.states.tensors import nbytes

_T = TypeVar("_T")


@dataclass
class Services:
    """
    Attributes:
        dispatcher: takes the texts.
        intake: reads request bodies.
        name: of the model.
        access: keys, hosts and origins.
        request_seconds: for a request, from its arrival to the end of its last text.
        caching: whether the replicas have a prefix cache.
        logs: what may stand in the log.
        quotas: what each key has left of its limits.
        states: where states are kept; None: they are not.
        started: when the server was started.
    """

    dispatcher: Dispatcher
    intake: Intake
    name: str
    access: AccessRules
    request_seconds: float
    caching: bool
    logs: LogOptions = field(default_factory=LogOptions)
    quotas: Quotas = field(default_factory=Quotas)
    states: StateStore | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    _requests: itertools.count = field(default_factory=itertools.count)

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        """Spellings of the model's tokens. The tokenizer must be loaded."""
        return TokenTexts(self.intake.loaded.result()[0])

    @property
    def keeps_states(self) -> bool:
        """Whether clients may keep states."""
        return self.states is not None

    @property
    def metrics(self) -> Metrics:
        return self.dispatcher.metrics

    @property
    def layout(self) -> Layout:
        """What a state of the model is. A replica must be ready."""
        if self.dispatcher.layout is None:
            raise ApiError(503, "no replica has said yet what a state of its model is; try again", retry_after=1)
        return self.dispatcher.layout

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors of a state."""
        return sum(nbytes(dtype, shape) for dtype, shape in self.layout.tensors.values())

    def deadline(self, seconds: float) -> float:
        """In so many seconds, by the dispatcher's clock."""
        return self.dispatcher.clock() + seconds if seconds < math.inf else math.inf

    def owner(self, request: Request) -> tuple[Any, ...]:
        """The owner of a request's texts. Keys take turns, so do the clients of a key and the requests of a client."""
        client = "" if request.client is None else request.client.host
        key = key_of(request)
        return "" if key is None else key.name, client, next(self._requests)

    def submit(self, request: Request, jobs: Sequence[Job], prompt_tokens: int) -> Grant:
        """Send a request's texts to the replicas, within the limits of its key.

        Args:
            prompt_tokens: of all its prompts, each counted once.

        Returns:
            What is to be ended with the request.

        Raises:
            ApiError: the key has too little left, or the dispatcher refuses the texts.
        """
        for job in jobs:
            job.request_id = request_id(request)
        most = sum(job.max_new_tokens for job in jobs)
        grant = self.quotas.admit(key_of(request), len(jobs), prompt_tokens, most)
        try:
            self.dispatcher.submit(jobs)
        except BaseException:
            grant.withdraw()
            raise
        return grant

    async def read(self, request: Request, prepare: Prepare[_T]) -> _T:
        """The request's body as ``prepare`` reads it, off the event loop.

        Raises:
            ApiError: it is no JSON or no valid request, or too many wait to be read.
            ClientDisconnect: the client is gone.
        """
        require_json(request)
        await asyncio.shield(asyncio.wrap_future(self.intake.loaded))
        async with self.intake.receive(request.stream()) as body:
            return await self.intake.prepare(body, prepare)
