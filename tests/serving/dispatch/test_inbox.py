"""The inbox of a request: who reads it is woken when there is something to do."""

from __future__ import annotations

import asyncio

import pytest

from mambakit.serving.dispatch.jobs import Inbox
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Piece

PIECE, LAST = Piece(0, "x", 1), Piece(0, "y", 1, "length")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("least", "before", "last"), [(1, 0, PIECE), (3, 2, PIECE), (3, 0, LAST), (3, 1, LAST)])
def test_the_reader_is_woken_by_enough_pieces_or_by_an_end(least, before, last):
    async def run() -> None:
        inbox = Inbox(least)
        for _ in range(2):  # the second time as the first
            reader = asyncio.ensure_future(inbox.take())
            await settle()
            for _ in range(before):
                inbox.put(7, PIECE)
                await settle()
                assert not reader.done()
            inbox.put(7, last)
            assert await asyncio.wait_for(reader, 10) == [(7, PIECE)] * before + [(7, last)]

    asyncio.run(run())


@pytest.mark.parametrize("waits", [True, False])
def test_an_error_comes_after_the_pieces_before_it_and_stays(waits):
    async def run() -> None:
        inbox, error = Inbox(3), ApiError(503, "gone")
        reader = asyncio.ensure_future(inbox.take())
        if waits:
            await settle()
        inbox.put(0, PIECE)
        inbox.fail(error)
        assert await reader == [(0, PIECE)]
        for _ in range(2):
            with pytest.raises(ApiError) as found:
                await inbox.take()
            assert found.value is error

    asyncio.run(run())


def test_a_reader_that_was_cancelled_takes_nothing_with_it():
    async def run() -> None:
        inbox = Inbox()
        gone = asyncio.ensure_future(inbox.take())
        await settle()
        gone.cancel()
        await settle()
        inbox.put(0, PIECE)
        inbox.put(0, LAST)
        assert await inbox.take() == [(0, PIECE), (0, LAST)]

    asyncio.run(run())
