"""From bodies to token ids, and what goes on meanwhile."""

from __future__ import annotations

import json
import threading
import time
from array import array

import pytest

from mambakit.serving.api.completions import prepare
from mambakit.serving.api.intake import SMALL, IntakeOptions
from mambakit.serving.api.prompts import Codec
from mambakit.serving.errors import ApiError
from mambakit.serving.http.connection_limits import ConnectionLimits
from tests.serving.api_server import LIMITS, api_server, byte_tokenizer, read_all, status_of
from tests.serving.conftest import wait_until

MIB = 1 << 20


@pytest.fixture(scope="module")
def usual():
    with api_server(limits=ConnectionLimits(), intake=IntakeOptions(waiting=4)) as one:
        yield one


def worst_bodies(size: int) -> dict[str, bytes]:
    """JSON that takes the longest to read, for its size."""
    return {
        "numbers": b"[" + b"1," * (size // 2 - 2) + b"1]",
        "lists": b"[" + b"[]," * (size // 3 - 2) + b"1]",
        "objects": b"[" + b"{}," * (size // 3 - 2) + b"1]",
        "a prompt of lists": b'{"prompt":[' + b"[]," * (size // 3 - 9) + b"[1]]}",
        "a prompt of ids": b'{"prompt":[' + b"1," * (size // 2 - 9) + b"1]}",
        "depth": b"[" * size,
        "many depths": b"[" + (b"[" * 900 + b"]" * 900 + b",") * (size // 1801 - 1) + b"1]",
        "keys": b"{" + b",".join(b'"%06x":1' % i for i in range(size // 11)) + b"}",
        "a string": b'{"prompt":"' + b"a" * (size - 20) + b'"}',
        "escapes": b'{"prompt":"' + b"\\u65e5" * (size // 6 - 9) + b'"}',
        "an unknown field": b'{"' + b"a" * (size - 20) + b'":1}',
        "digits": b'{"prompt":' + b"1" * min(size, 10**6) + b"}",
        "fractions": b"[" + b"1e9," * (size // 4 - 2) + b"1]",
        "strings": b'["' + b'","' * (size // 3 - 2) + b'"]',
        "noise": bytes(range(256)) * (size // 256),
        "blanks": b" " * size,
    }


@pytest.mark.parametrize("size", [SMALL, 4 * MIB])
def test_a_body_stops_nobody(usual, size):
    """A heartbeat on the event loop, while bodies are read that take a second in its thread."""
    gaps: list[float] = []
    watching = threading.Event()

    def beat() -> None:
        began = time.perf_counter()
        loop.call_soon_threadsafe(lambda: (gaps.append(time.perf_counter() - began), heard.set()))

    loop = usual.server._sweeping.get_loop()
    heard = threading.Event()

    def watch() -> None:
        while not watching.wait(0.002):
            heard.clear()
            beat()
            heard.wait(10)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        worst = {}
        for name, body in worst_bodies(size).items():
            gaps.clear()
            status, received = usual.ask(usual.post(body))
            assert status in (200, 400), received
            worst[name] = max(gaps, default=0.0)
    finally:
        watching.set()
        thread.join()
    # Reading a body of 4 MiB in this process takes up to 1.4 s; busy machines are late by themselves.
    print(size, {name: round(1e3 * gap, 1) for name, gap in worst.items()})
    assert sorted(worst.values())[-3] < 0.1, worst


def test_prompts_become_ids():
    codec = Codec(byte_tokenizer())

    def ids(**body) -> list[list[int]]:
        found = prepare(json.dumps(body).encode(), codec, LIMITS).prompts
        return [array("q", one).tolist() for one in found]

    text = "naïve 日本 🙂 <|endoftext|>\n"
    expected = byte_tokenizer().backend_tokenizer.encode(text).ids
    assert ids(prompt=[text, "", "b"]) == [expected, [0], byte_tokenizer().backend_tokenizer.encode("b").ids]
    assert ids(prompt=[[1, 2], [3]]) == [[1, 2], [3]]
    assert ids(prompt="a" * 10) == ids(prompt=["a" * 10])


@pytest.mark.parametrize("content", ["small", "large"])
def test_both_ways_answer_alike(usual, content):
    pad = " " * (0 if content == "small" else 2 * SMALL)
    asked = [
        (200, {"prompt": ["a", "b"], "max_tokens": 2, "echo": True}),
        (200, {"prompt": [[1, 2]], "max_tokens": 2, "echo": True}),
        (400, {"prompt": [256]}),
        (400, {"prompt": "a", "temperature": -1}),
        (404, {"prompt": "a", "model": "other"}),
        (400, {"prompt": None}),
    ]
    for status, body in asked:
        answered, received = usual.ask(usual.post(json.dumps(body).encode() + pad.encode()))
        assert answered == status, received
        answer = json.loads(received.partition(b"\r\n\r\n")[2])
        if status == 200:
            assert len(answer["choices"]) == len(body["prompt"])
            assert answer["choices"][0]["text"].endswith("xx")
        else:
            assert answer["error"]["message"]


def test_a_text_that_cannot_fit_is_not_tokenised():
    from dataclasses import replace

    codec, limits = Codec(byte_tokenizer()), replace(LIMITS, max_prompt_tokens=10)
    codec._encode = None  # type: ignore[assignment]
    with pytest.raises(ApiError, match="has 1,000 characters, more than 10 tokens can stand for"):
        codec.encode("a" * 1000, limits)


@pytest.mark.parametrize("body", [{"prompt": "a" * 20_000, "n": 100}, {"prompt": [[1] * 20_000], "n": 100}])
def test_echo_is_bounded(usual, body):
    status, received = usual.ask(usual.post(**body, echo=True, max_tokens=1))
    assert status == 400
    assert b"leave echo out" in received
    assert usual.ask(usual.post(**body, max_tokens=1))[0] == 200


def test_what_waits_to_be_read_is_bounded_and_a_slow_reader_is_ended(monkeypatch):
    """The process is stopped: bodies wait, more are refused, and its time is over in the end."""
    import os
    import signal

    with api_server(intake=IntakeOptions(processes=1, waiting=2, seconds=1.0)) as one:
        large = one.post(prompt="a" * 2 * SMALL, max_tokens=1)
        assert one.ask(large)[0] == 200
        (process,) = running_processes(one)
        os.kill(process.pid, signal.SIGSTOP)
        clients = []
        for _ in range(6):
            clients.append(one.connect())
            clients[-1].sendall(large)
            time.sleep(0.05)
        assert one.ask(one.post(max_tokens=1))[0] == 200, "small ones go another way"
        answers = [status_of(read_all(client)) for client in clients]
        assert answers[0] == 400, "its time was over"
        assert 503 in answers[1:], "too many waited"
        assert one.ask(large)[0] == 200, "another process reads on"
        (after,) = running_processes(one)
        assert after.pid != process.pid
    wait_until(lambda: not after.is_alive(), "no process outlives the server", 5)


def running_processes(one) -> list:
    return [lane._process for lane in one.intake._processes if lane._process is not None]


def test_a_tokenizer_of_python_is_called_alone():
    class Slow:
        bos_token_id = eos_token_id = None
        calls = 0

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, text: str, **_):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[0] * len(text))

    codec = Codec(Slow())
    assert codec.encode("aaa", LIMITS) == [0, 0, 0]
    with pytest.raises(ApiError, match="no bos token"):
        codec.encode("", LIMITS)
