"""What a connection may take, tried with sockets."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mambakit.serving.api.intake import IntakeOptions
from mambakit.serving.http.connection_limits import ConnectionLimits
from tests.serving.api_server import ApiServer, api_server, read_all, status_of
from tests.serving.conftest import wait_until

LIMITS = ConnectionLimits(
    connections=20, header_bytes=2048, headers=20, url_bytes=500, body_bytes=200 << 10, header_seconds=0.5,
    body_seconds=0.5, idle_seconds=0.5, write_seconds=0.5, rate=1 << 20,
)  # fmt: skip


@pytest.fixture(scope="module")
def strict():
    with api_server(limits=LIMITS, intake=IntakeOptions(unfinished_bytes=150 << 10)) as one:
        yield one


@pytest.fixture
def usual():
    with api_server(limits=ConnectionLimits(write_seconds=0.5, rate=1 << 20), drain_seconds=0.5) as one:
        yield one


CHUNKED = {"Transfer_Encoding": "chunked"}
WRONG = {
    "a long header": lambda f: (431, f.head("GET", "/health", X="y" * 3000)),
    "a header without an end": lambda f: (431, f.head("GET", "/health")[:-2] + b"X: " + b"y" * (4 << 20)),
    "many headers": lambda f: (431, f.head("GET", "/health", **{f"X{i}": "y" for i in range(30)})),
    "a long URL": lambda f: (414, f.head("GET", "/" + "a" * 1000)),
    "a long URL without an end": lambda f: (414, b"GET /" + b"a" * (4 << 20)),
    "a declared length": lambda f: (413, f.head(Content_Length=2 << 20)),
    "a length beyond 64 bits": lambda f: (400, f.head(Content_Length=10**30)),
    "a body that grows": lambda f: (
        413, f.head(**CHUNKED) + b"10000\r\n" + b" " * 0x10000 + (b"\r\n10000\r\n" + b" " * 0x10000) * 20
    ),
    "tiny chunks": lambda f: (400, f.head(**CHUNKED) + b"1\r\n \r\n" * 50_000),
    "a chunk's extension": lambda f: (400, f.head(**CHUNKED) + b"1;x=" + b"y" * 100_000),
    "a trailer": lambda f: (400, f.head(**CHUNKED) + b"1\r\n \r\n0\r\n" + b"X: y\r\n" * 50_000),
    "a chunk without a length": lambda f: (400, f.head(**CHUNKED) + b"zz\r\n"),
    "two lengths": lambda f: (400, f.head(Content_Length=2)[:-2] + b"Content-Length: 2\r\n\r\n{}"),
    "two other lengths": lambda f: (400, f.head(Content_Length=2)[:-2] + b"Content-Length: 3\r\n\r\n{}"),
    "lengths in a list": lambda f: (400, f.head(Content_Length="2, 2") + b"{}"),
    "a signed length": lambda f: (400, f.head(Content_Length="+2") + b"{}"),
    "length and chunks": lambda f: (400, f.head(Content_Length=2, **CHUNKED) + b"2\r\n{}\r\n0\r\n\r\n"),
    "chunks and length": lambda f: (400, f.head(**CHUNKED)[:-2] + b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "another coding": lambda f: (400, f.head(Transfer_Encoding="gzip, chunked") + b"2\r\n{}\r\n0\r\n\r\n"),
    "two codings": lambda f: (400, f.head(**CHUNKED)[:-2] + b"Transfer-Encoding: identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": lambda f: (
        400, f.head(**CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0") + b"2\r\n{}\r\n0\r\n\r\n"
    ),
    "a blank before the colon": lambda f: (400, f.head("GET", "/health")[:-2] + b"X : y\r\n\r\n"),
    "a folded header": lambda f: (400, f.head("GET", "/health", X="y\r\n z")),
    "a zero byte": lambda f: (400, f.head("GET", "/health", X="y\0z")),
    "line ends of one character": lambda f: (400, f.head("GET", "/health").replace(b"\r\n", b"\n")),
    "an upgrade": lambda f: (
        400, f.head("GET", "/health", Connection="Upgrade", Upgrade="websocket") + b"\x81\x05hello"
    ),
    "an upgrade with a body": lambda f: (400, f.head(Connection="Upgrade", Upgrade="h2c", Content_Length=2) + b"{}"),
    "a tunnel": lambda f: (400, b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n"),
    "a proxy's request": lambda f: (400, f.head("GET", "http://example.org/health")),
    "HTTP/2": lambda f: (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": lambda f: (505, b"GET /health HTTP/0.9\r\n\r\n"),
    "no version": lambda f: (505, b"GET /health\r\n\r\n"),
    "no host": lambda f: (400, b"GET /health HTTP/1.1\r\n\r\n"),
    "no host in HTTP/1.0": lambda f: (400, b"GET /health HTTP/1.0\r\n\r\n"),
    "two hosts": lambda f: (400, f.head("GET", "/health")[:-2] + b"Host: localhost\r\n\r\n"),
    "TLS": lambda f: (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
    "noise": lambda f: (400, bytes(range(256)) * 100),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_too_much_or_has_two_readings_is_answered_and_closed(strict, what):
    status, request = WRONG[what](strict)
    answered, received = strict.ask(request)
    assert answered == status, received
    assert b"connection: close" in received
    assert len(re.findall(rb"HTTP/1.1 \d", received)) == 1
    assert b'"message": "' in received or b'"message":"' in received
    wait_until(lambda: not strict.server.server_state.tasks, "no request is left", 5)


def test_within_the_limits(strict):
    assert strict.ask(strict.post(max_tokens=3))[0] == 200
    body = b'{"prompt": "a", "max_tokens": 3}'
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:]))
    assert strict.ask(strict.head(**CHUNKED) + chunks + b"0\r\nX: y\r\n\r\n")[0] == 200
    with strict.connect() as client:
        for _ in range(3):  # a connection's counts begin again with each request
            client.sendall(strict.post(prompt="a" * 100_000, max_tokens=2).replace(b"Connection: close\r\n", b""))
            received = b""
            while not received.endswith(b"}"):
                received += client.recv(1 << 16)
            assert status_of(received) == 200
    expecting = strict.head(Content_Length=len(body), Expect="100-continue")
    with strict.connect() as client:
        client.sendall(expecting)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 100")
        client.sendall(body)
        assert status_of(read_all(client)) == 200


def waits(client: socket.socket) -> tuple[int, float]:
    """The status that comes by itself, and after how long the connection is closed."""
    began = time.monotonic()
    return status_of(read_all(client)), time.monotonic() - began


def trickle(client: socket.socket, bytes_: bytes) -> float:
    """Seconds until the server has had enough of a byte every 50 ms."""
    began = time.monotonic()
    try:
        for byte in bytes_:
            client.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass
    return time.monotonic() - began


def test_deadlines(strict):
    with strict.connect() as silent, strict.connect() as half, strict.connect() as idle, strict.connect() as body:
        half.sendall(b"GET /health HT")
        idle.sendall(strict.head("GET", "/health"))
        body.sendall(strict.head(Content_Length=100) + b"{")
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(waits, (silent, half, idle, body)))
    assert [status for status, _ in found] == [0, 408, 200, 408]
    assert all(0.3 < seconds < 6 for _, seconds in found), found


def test_trickling_is_no_way_around_them(strict):
    def headers() -> float:
        with strict.connect() as client:
            return trickle(client, strict.head("GET", "/health") * 10)

    def body() -> float:
        with strict.connect() as client:
            client.sendall(strict.head(Content_Length=1000))
            return trickle(client, b" " * 1000)

    def second() -> float:
        with strict.connect() as client:
            client.sendall(strict.head("GET", "/health"))
            client.recv(1 << 16)
            return trickle(client, strict.head("GET", "/health") * 10)

    with ThreadPoolExecutor() as pool:
        found = [f.result() for f in [pool.submit(one) for one in (headers, body, second)]]
    assert all(seconds < 6 for seconds in found), found


def test_a_full_house_lets_newcomers_in(strict):
    idle = [strict.connect() for _ in range(60)]
    assert strict.health() < 5
    assert len(strict.server.server_state.connections) <= LIMITS.connections + 1
    for client in idle:
        client.close()


def test_a_house_full_of_requests_says_so(strict):
    strict.replicas.seconds = 0.1
    busy = [strict.connect() for _ in range(LIMITS.connections)]
    try:
        for client in busy:
            client.sendall(strict.post(max_tokens=50))
        wait_until(lambda: len(strict.replicas.jobs) >= len(busy), "all are asked")
        status, received = strict.ask(strict.head("GET", "/health"))
        assert status == 503
        assert b"retry-after" in received.lower()
    finally:
        strict.replicas.seconds = 0.0
        for client in busy:
            client.close()
    wait_until(lambda: len(strict.server.server_state.connections) == 0, "all are gone", 10)


def test_unfinished_bodies_in_sum(strict):
    rest = b" " * 100_000
    held = [strict.connect() for _ in range(6)]
    for client in held:
        client.sendall(strict.head(Content_Length=200_000) + rest)
    with ThreadPoolExecutor() as pool:
        small = pool.submit(strict.ask, strict.post(max_tokens=1))
        answers = [status for status, _ in pool.map(waits, held)]
    assert small.result()[0] == 200, "a small request never waits for large ones"
    assert set(answers) <= {503, 408}
    for client in held:
        client.close()
    assert strict.ask(strict.post(prompt="a" * 100_000, max_tokens=1))[0] == 200, "what was counted is given back"


def stuck(one: ApiServer, **body) -> socket.socket:
    """A client that does not read."""
    one.replicas.piece = "x" * 200_000
    client = one.connect(receive_bytes=4096)
    client.sendall(one.post(max_tokens=100, **body))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_left(usual, stream):
    with stuck(usual, stream=stream) as client:
        wait_until(lambda: usual.replicas.jobs, "it was asked")
        wait_until(lambda: not usual.server.server_state.connections, "the connection is gone", 40)
        wait_until(lambda: not usual.server.server_state.tasks, "its request is gone", 5)
        client.close()
    assert usual.health() < 5


def test_a_drain_with_a_client_that_does_not_read_ends_in_time(usual, caplog):
    usual.server.config.http_protocol_class.keywords["limits"].__dict__["write_seconds"] = 1000.0
    with stuck(usual, stream=True), stuck(usual, stream=False):
        wait_until(lambda: len(usual.replicas.jobs) == 2, "both are asked")
        began = time.monotonic()
        usual.server.should_exit = True
        usual.thread.join(20)
        assert time.monotonic() - began < 0.5 + 1.0 + 3.0
    assert "Traceback" not in caplog.text
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_client_that_has_finished_sending_is_answered(usual, stream, seconds):
    usual.replicas.seconds = seconds  # the first token comes after the first two probes
    with usual.connect() as client:
        client.sendall(usual.post(max_tokens=12, stream=stream))
        client.shutdown(socket.SHUT_WR)
        received = read_all(client)
    assert status_of(received) == 200
    if stream:
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert b"x" * 12 in received


def test_a_client_that_is_gone_is_told_from_one_that_has_finished_sending(usual):
    usual.replicas.seconds = 1.0
    for stream in (True, False):
        with usual.connect() as client:
            client.sendall(usual.post(max_tokens=100, stream=stream))
            wait_until(lambda: usual.replicas.jobs, "it was asked")
        wait_until(lambda: not usual.server.server_state.tasks, "its request is gone before the second probe", 2.5)
        usual.replicas.jobs.clear()
    assert usual.replicas.cancelled == 2


def test_half_a_request_of_a_client_that_has_finished_sending(usual):
    for request in (b"GET /hea", usual.head(Content_Length=10) + b"{"):
        with usual.connect() as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            assert status_of(read_all(client)) == 400


def test_a_request_that_comes_too_early_is_not_kept(usual):
    usual.replicas.seconds = 0.02
    for _ in range(3):
        status, received = usual.ask(usual.post(max_tokens=5) + usual.head("GET", "/health") * 10_000)
        assert status == 200
        assert len(re.findall(rb"HTTP/1.1 \d", received)) == 1


def test_a_refusal_before_the_body_is_heard(usual):
    """The answer arrives although the client is still sending."""
    content = b" " * (3 << 20)
    head = usual.head(Content_Length=len(content), Content_Type="text/plain")
    status, received = usual.ask(head + content)
    assert status == 415
    assert b"connection: close" in received


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_has_an_end(stream):
    with api_server(request_seconds=0.6) as one:
        one.replicas.seconds = 0.25
        status, received = one.ask(one.post(max_tokens=1000, stream=stream))
        assert status == (200 if stream else 504)
        assert b"not done within 0.6 seconds (--request-seconds)" in received
        assert one.replicas.cancelled == 1
        assert one.ask(one.post(max_tokens=1, stream=stream))[0] == 200


def test_a_connection_that_ends_with_an_error_of_the_server_says_so(usual, monkeypatch):
    """A client must not send its next request into a connection that is being closed."""

    def submit(jobs):
        raise KeyError("a bug")

    monkeypatch.setattr(usual.replicas, "submit", submit)
    request = usual.head(Content_Length=15) + b'{"prompt": "a"}'
    status, received = usual.ask(request)
    assert status == 500
    assert b"\r\nconnection: close\r\n" in received.lower()
    assert b"the server failed on this request (KeyError)" in received


@pytest.mark.skipif(sys.platform != "linux", reason="reads a connection's state as Linux gives it")
def test_a_burst_of_connections_while_the_server_is_busy():
    """Each is established at once: a handshake that is dropped is repeated after a second."""
    established, busy, released = 1, threading.Event(), threading.Event()
    with api_server() as one, contextlib.ExitStack() as opened:

        def submit(jobs: list) -> None:
            busy.set()
            released.wait(20)

        one.replicas.submit = submit  # type: ignore[method-assign]
        first = opened.enter_context(one.connect())
        first.sendall(one.post())
        assert busy.wait(10)
        try:
            clients = [opened.enter_context(socket.socket()) for _ in range(400)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(one.address)
            states = [client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for client in clients]
        finally:
            released.set()
        assert states.count(established) == 400
