"""Answers of many log-probabilities: other clients are served while they are written. How streams are sent."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from starlette.responses import JSONResponse

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.answers import CompletionAnswer, Usage
from mambakit.serving.api.completions import parse
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.http.request_log import RequestLog
from mambakit.serving.http.texts import MANY, Texts, _ChoicesResponse, _turns
from mambakit.serving.messages import Piece, Scored
from tests.serving.api_server import LIMITS, byte_tokenizer

TOP = tuple((token, -1.0 - token) for token in range(20))


class Keeping:
    async def acknowledge(self, kept: Any) -> None: ...


def texts(stream: bool, n: int = 2) -> Texts:
    """A request's texts of 300 tokens, all of which are there already, as behind a client that has read nothing."""
    asked = parse({"prompt": "a", "n": n, "logprobs": 20, "stream": stream}, LIMITS)
    answer = CompletionAnswer("m", [""] * n, TokenTexts(byte_tokenizer()))
    inbox = Inbox()
    jobs = [Job(inbox, index, b"", 1, {}, 300) for index in range(n)]
    for at in range(300):
        for index in range(n):
            scored = Scored(65 + at % 26, -1.0, at, TOP)
            inbox.put(index, Piece(0, "x", 1, "length" if at == 299 else "", log_probs=(scored,)))
    return Texts(asked, answer, inbox, jobs, Usage([1], n), lambda tokens: [], Keeping())  # type: ignore[arg-type]


def test_others_take_turns_with_a_stream_that_has_piled_up():
    async def run() -> tuple[list[bytes], list[int]]:
        events: list[bytes] = []
        turns: list[int] = []

        async def other() -> None:
            while True:
                turns.append(len(events))
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        one = texts(stream=True)
        async for event in one._events(await one.inbox.take()):
            events.append(event)  # noqa: PERF401 - `other` looks at it meanwhile
        task.cancel()
        return events, turns

    events, turns = asyncio.run(run())
    assert len(set(turns)) > 600 * 21 // MANY - 1
    assert max(b - a for a, b in itertools.pairwise(turns)) <= 2
    found: dict[int, dict[str, Any]] = {index: {"text": "", "tokens": []} for index in range(2)}
    for line in b"".join(events).decode().split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        found[choice["index"]]["text"] += choice["text"]
        found[choice["index"]]["tokens"] += choice["logprobs"]["tokens"]
    whole = json.loads(asyncio.run(texts(stream=False).whole()).body)
    for choice in whole["choices"]:
        assert found[choice["index"]] == {"text": choice["text"], "tokens": choice["logprobs"]["tokens"]}
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("tokens", [0, 1, 100, 1000])
def test_turns(tokens):
    pieces = [(at % 3, Piece(at, "x", 1, log_probs=(Scored(5, -1.0, at, TOP),) * (at % 4))) for at in range(tokens)]
    turns = list(_turns(pieces))
    assert [one for some in turns for one in some] == pieces
    assert all(sum(21 * len(piece.log_probs) for _, piece in some) < MANY + 4 * 21 for some in turns)
    plain = [(0, Piece(0, "x", 1))] * tokens
    assert list(_turns(plain)) == ([plain] if plain else [])  # events without log-probabilities go out as one


def test_a_whole_answer_is_the_same_json():
    body = {"id": "é", "choices": [{"index": 0, "text": "日本"}, {"index": 1, "logprobs": None}], "usage": {"a": 1.5}}
    assert _ChoicesResponse(body).body == JSONResponse(body).body
    assert json.loads(_ChoicesResponse({"choices": []}).body) == {"choices": []}


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_sends_its_parts_past_the_applications_on_the_way_and_its_end_with_the_last(fails):
    async def run() -> tuple[list[Any], list[Any], list[str]]:
        one, sent, passed, ended = texts(stream=True, n=1), [], [], []
        if fails:
            one.inbox = Inbox()
            one.inbox.put(0, Piece(0, "x", 1))
            one.inbox.fail(ApiError(503, "gone"))
        response = await one.stream(lambda: ended.append("ended"))

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def watched(message: Any) -> None:
                passed.append(message["type"])
                await send(message)

            await response(scope, receive, watched)

        await RequestLog(app)({"type": "http", "path": "/", "method": "POST"}, receive, send)
        return sent, passed, ended

    sent, passed, ended = asyncio.run(run())
    assert (passed, ended) == (["http.response.start"], ["ended"])
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    events = b"".join(message["body"] for message in sent[1:]).split(b"\n\n")
    if fails:
        assert b'"text":"x"' in events[0]
        assert b'"message":"gone"' in events[1]
        assert events[2:] == [b""]
    else:
        assert events[-2:] == [b"data: [DONE]", b""]
        assert sent[-1]["body"].endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in sent[-1]["body"]


def test_a_client_that_disconnects_ends_its_stream():
    async def run() -> list[str]:
        one, ended = texts(stream=True, n=1), []
        one.inbox = Inbox()
        one.inbox.put(0, Piece(0, "x", 1))
        response, gone = await one.stream(lambda: ended.append("ended")), asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body"):
                gone.set()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        await asyncio.wait_for(RequestLog(response)({"type": "http", "path": "/", "method": "POST"}, receive, send), 10)
        return ended

    assert asyncio.run(run()) == ["ended"]
