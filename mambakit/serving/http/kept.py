"""The state that a request starts from, and those that its texts leave: room for them, and their acknowledgement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from mambakit.serving.api.states import Keep
from mambakit.serving.errors import ApiError
from mambakit.serving.http.services import Services
from mambakit.serving.messages import Kept, StateTask
from mambakit.serving.states.store import StateStore

_MORE = 4096  # bytes of a file besides its tensors


def require_store(services: Services) -> StateStore:
    """
    Raises:
        ApiError: the server keeps no states.
    """
    if services.states is None:
        raise ApiError(400, "this server keeps no states; serve with --states FOLDER", code="states_off")
    return services.states


class Keeping:
    """What one request has to do with states.

    Args:
        owner: the request's key.
        keep: how its texts' states are kept; None: they are not.
        origin: of those states.

    Attributes:
        task: what each of its texts has to do with states; None: nothing.
    """

    def __init__(self, services: Services, owner: str, keep: Keep | None, origin: str):
        self._services, self._owner, self._keep, self._origin = services, owner, keep, origin
        self._parent = ""
        self._room = contextlib.ExitStack()
        self.task: StateTask | None = None

    async def begin(self, state: str, texts: int, tokens: int) -> None:
        """Find the state to start from, and reserve room for those that are left.

        Args:
            state: its id, or "".
            texts: how many texts there are.
            tokens: of each, at most, besides those of the state.

        Raises:
            ApiError: there is no such state, it is of another model, or there is no room.
        """
        if not state and self._keep is None:
            return
        await asyncio.to_thread(self._begin, state, texts, tokens)

    def _begin(self, state: str, texts: int, tokens: int) -> None:
        store, layout = require_store(self._services), self._services.layout
        blob = ""
        if state:
            record = store.get(self._owner, state)
            if record.fingerprint != layout.fingerprint:
                raise ApiError(
                    409, f"the state {state} is of another model than the one that is served; read its text again",
                    param="state", code="state_of_another_model",
                )  # fmt: skip
            self._parent, blob, tokens = record.id, record.blob, tokens + record.tokens
        if self._keep is not None:
            size = self._services.state_bytes + 4 * tokens + _MORE
            self._room.enter_context(store.reserved(self._owner, texts * size))
        self.task = StateTask(blob, self._keep is not None)

    async def acknowledge(self, kept: Kept | None) -> dict[str, Any] | None:
        """What a client is told of a text's state, which is durable then; None where none was to be kept."""
        if kept is None or self._keep is None:
            return None
        try:
            return await asyncio.to_thread(self._add, kept)
        except ApiError as error:  # the text itself is whole
            return error.body

    async def acknowledge_only(self, kept: Kept | None) -> dict[str, Any]:
        """The same where there is nothing but the state.

        Raises:
            ApiError: it could not be kept.
        """
        assert kept is not None
        return await asyncio.to_thread(self._add, kept)

    def _add(self, kept: Kept) -> dict[str, Any]:
        assert self._keep is not None
        if kept.error:
            raise ApiError(kept.status, kept.error, code=kept.code)
        record = require_store(self._services).add(
            self._owner, kept, self._services.layout.fingerprint, origin=self._origin, parent=self._parent,
            expires_after=self._keep.expires_after, metadata=self._keep.metadata,
        )  # fmt: skip
        return record.body

    def came_from(self, parent: str) -> None:
        """The state is a branch of another than the one it was read from."""
        self._parent = parent or self._parent

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """A context that closes it where an exception leaves it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The request has ended."""
        self._room.close()
