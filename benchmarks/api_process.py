"""CPU time of a server's API process, per piece and per request, with replicas that compute nothing.

    python benchmarks/api_process.py --json out.json
    python benchmarks/api_process.py --profile 30              # and where the event loop's time goes, by function

A piece is what one text gains by one look of a replica's engine: with 64 slots and 4 tokens a look, a replica sends
64 pieces of 4 tokens in one message. The replicas here are those of `mambakit serve`, as processes with their pipes,
threads and tokenizer, but for the engine, which gives every text the next tokens of a sentence at fixed intervals. So
the load of the API process is that of fast GPUs, paced for the machine at hand. Clients are connections of this
process, which send one request after another and look for the ends of answers alone.

Two loads take turns, of answers that are streamed and that are whole: long texts, of which none begins or ends while
--seconds are measured, tell what a piece costs; texts of --new-tokens, one after another, what a request costs besides
its pieces. What the API process takes is `getrusage`'s: all its threads, user and system. Recorded for each kind of
answer, medians over the rounds (and least: the least of them):

    piece_us, piece_least_us       of a piece
    request_us, request_least_us   of a request, from its parsing to its end, without its pieces
    text_us, text_least_us         of a text of --new-tokens, with all of its pieces
    loop_share, system_share       of a text's CPU time, the shares of the event loop's thread, and of the kernel
    pieces, messages, requests     of one round of such texts

CPU time is counted, not time that passes: other programs on the machine make it slower by little.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import functools
import json
import multiprocessing
import pstats
import random
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.serving import server
from mambakit.serving.api.intake import IntakeOptions
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Replica
from mambakit.serving.messages import Batch, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.replicas import worker
from mambakit.serving.replicas.process import ReplicaProcess
from mambakit.serving.replicas.supervisor import Supervisor

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps until the morning comes. "
VOCABULARY = 512  # of the embedded model
BEGIN_SECONDS = 1.0  # for all connections' texts to begin


# -- replicas ----------------------------------------------------------------------------------------------------------


class SyntheticEngine:
    """In the place of `Engine`: a look every ``seconds`` gives each text in a slot up to ``look`` tokens."""

    def __init__(self, slots: int, tokens: Sequence[int], look: int, seconds: float):
        self._slots, self._tokens, self._look, self._seconds = slots, tokens, look, seconds
        self._requests: list[Any] = []
        self._next = time.monotonic()

    @property
    def busy(self) -> int:
        return min(self._slots, len(self._requests))

    def submit(self, request: Any) -> Any:
        self._requests.append(request)
        return request

    def step(self) -> list[tuple[Any, int]]:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(self._next, time.monotonic() - self._seconds) + self._seconds
        found = []
        for request in self._requests[: self._slots]:
            at = len(request.tokens)
            new = [self._tokens[i % len(self._tokens)] for i in range(at, min(at + self._look, request.max_new_tokens))]
            request.tokens += new
            found += [(request, token) for token in new]
            if len(request.tokens) == request.max_new_tokens:
                request.finish_reason = request.finish_reason or "length"
        self._requests = [request for request in self._requests if not request.finish_reason]
        return found


def replica(look: int, seconds: float, options: WorkerOptions, connection: Any) -> None:
    """The process of a replica, with a `SyntheticEngine`."""

    class Worker(worker._Worker):
        def _warm_up(self, lengths: tuple[int, ...]) -> None:
            tokens = self.tokenizer(SENTENCE).input_ids
            self.engine = SyntheticEngine(options.slots, tokens, look, seconds)  # type: ignore[assignment]

    worker._Worker = Worker  # type: ignore[misc]
    worker.main(options, connection)


# -- the server --------------------------------------------------------------------------------------------------------


@dataclass
class Used:
    """What the API process has used and handled since its start."""

    seconds: float = 0.0
    system_seconds: float = 0.0
    loop_seconds: float = 0.0
    pieces: int = 0
    messages: int = 0

    def since(self, before: Used) -> Used:
        return Used(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


class CountingDispatcher(Dispatcher):
    """Counts what the replicas send."""

    used = Used()

    def receive(self, replica: Replica, batch: Batch) -> None:
        self.used.messages += 1
        self.used.pieces += len(batch.pieces)
        super().receive(replica, batch)


def serve(options: argparse.Namespace, control: Any) -> None:
    """The API process. It sends its port, answers every message with what it has used, and ends after None."""
    worker_options = WorkerOptions(default_model_path(), slots=options.slots)
    devices = ("cpu",) * options.replicas
    server_options = server.ServerOptions(
        worker_options,
        devices,
        "m",
        max_waiting=100_000,
        max_new_tokens=1 << 20,
        intake=IntakeOptions(waiting=10_000),
        drain_seconds=0.0,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    dispatcher = CountingDispatcher(devices, slots=options.slots, max_waiting=100_000, metrics=Metrics())
    main = functools.partial(replica, options.look, options.look_ms / 1e3)

    def failed(reason: str) -> None:
        sys.exit(reason)

    supervisor = Supervisor(worker_options, dispatcher, failed, begin=functools.partial(ReplicaProcess, main=main))
    intake = server.make_intake(server_options)
    server.freeze_when_loaded(intake)
    serving = server.make_server(server_options, listener, dispatcher, supervisor, intake, failed)
    clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)

    def answer() -> None:
        while dispatcher.health()["status"] != "ok":
            time.sleep(0.05)
        control.send(listener.getsockname()[1])
        while control.recv():
            whole = resource.getrusage(resource.RUSAGE_SELF)
            used = Used(whole.ru_utime + whole.ru_stime, whole.ru_stime, time.clock_gettime(clock))
            used.pieces, used.messages = dispatcher.used.pieces, dispatcher.used.messages
            control.send(used)
        serving.should_exit = True

    threading.Thread(target=answer, daemon=True).start()
    if not options.profile:
        serving.run(sockets=[listener])
        return
    profile = cProfile.Profile()
    profile.runcall(serving.run, sockets=[listener])
    pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)


class Server:
    """The API process, ready."""

    def __init__(self, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(options, theirs))
        self._process.start()
        theirs.close()
        self.port: int = self._control.recv()

    def used(self) -> Used:
        self._control.send(True)
        found: Used = self._control.recv()
        return found

    def stop(self) -> None:
        self._control.send(None)
        self._process.join(60)


# -- clients -----------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """A connection that sends one request after another, for texts of ``lengths`` tokens."""

    def __init__(self, port: int, lengths: Sequence[int], stream: bool, seed: int):
        self._port, self._lengths, self._stream = port, list(lengths)[::-1], stream
        self._random = random.Random(seed)
        self._received = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
        await self.done

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError(f"the server closed the connection: {self._received!r}"))

    def _send(self) -> None:
        self._tokens = self._lengths.pop()
        body = {
            "prompt": [self._random.randrange(1, VOCABULARY) for _ in range(128)], "max_tokens": self._tokens,
            "temperature": 1.0, "stream": self._stream,
            **({"stream_options": {"include_usage": True}} if self._stream else {}),
        }  # fmt: skip
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
        self._transport.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._received.endswith(b"\r\n0\r\n\r\n" if self._stream else b"}"):
            return
        usage = b'"completion_tokens":%d,' % self._tokens
        if not self._received.startswith(b"HTTP/1.1 200") or usage not in self._received:
            self.done.set_exception(RuntimeError(self._received.decode()))
            return
        self._received.clear()
        if self._lengths:
            self._send()
        else:
            self.done.set_result(None)
            self._transport.close()


async def load(port: int, connections: int, requests: int, new_tokens: int, stream: bool, seed: int) -> None:
    """``requests`` of each connection; the first is shorter, so that clients differ."""
    chance = random.Random(seed)
    await run(
        [
            Client(
                port, [chance.randint(1, new_tokens), *[new_tokens] * (requests - 1)], stream, seed * connections + i
            )
            for i in range(connections)
        ]
    )


async def run(clients: Sequence[Client]) -> None:
    await asyncio.gather(*(client.run() for client in clients))


# -- figures -----------------------------------------------------------------------------------------------------------


async def used_by_pieces(one: Server, options: argparse.Namespace, stream: bool, seed: int) -> Used:
    """Of --seconds of long texts, when all have begun and none has ended."""
    looks = round((options.seconds + BEGIN_SECONDS + 1) * 1e3 / options.look_ms)
    new_tokens = looks * options.look
    clients = [
        Client(one.port, [new_tokens], stream, seed * options.connections + i) for i in range(options.connections)
    ]
    task = asyncio.ensure_future(run(clients))
    await asyncio.sleep(BEGIN_SECONDS)
    before = one.used()
    await asyncio.sleep(options.seconds)
    used = one.used().since(before)
    await task
    return used


def measure(one: Server, options: argparse.Namespace, stream: bool) -> dict[str, Any]:
    pieces, texts = [], []
    requests = options.connections * options.requests
    for number in range(options.rounds):
        pieces.append(asyncio.run(used_by_pieces(one, options, stream, 2 * number)))
        before = one.used()
        asyncio.run(load(one.port, options.connections, options.requests, options.new_tokens, stream, 2 * number + 1))
        texts.append(one.used().since(before))
    piece = [1e6 * used.seconds / used.pieces for used in pieces]
    request = [(1e6 * used.seconds - used.pieces * us) / requests for used, us in zip(texts, piece, strict=True)]
    text = [1e6 * used.seconds / requests for used in texts]
    last, seconds = texts[-1], sum(used.seconds for used in texts)
    row: dict[str, Any] = {"answers": "streamed" if stream else "whole"}
    for name, found in (("piece", piece), ("request", request), ("text", text)):
        row |= {f"{name}_us": statistics.median(found), f"{name}_least_us": min(found)}
    row |= {
        "loop_share": sum(used.loop_seconds for used in texts) / seconds,
        "system_share": sum(used.system_seconds for used in texts) / seconds,
        "pieces": last.pieces, "messages": last.messages, "requests": requests,
    }  # fmt: skip
    print(
        f"{row['answers']:9} {row['piece_us']:5.1f} us a piece (least {row['piece_least_us']:.1f}), "
        f"{row['request_us']:5.0f} us a request (least {row['request_least_us']:.0f}), {row['text_us']:5.0f} us a text "
        f"(least {row['text_least_us']:.0f}); {row['loop_share']:.2f} of it by the event loop, "
        f"{row['system_share']:.2f} by the kernel; {last.pieces / last.messages:.0f} pieces a message",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=64, help="of a replica; as many connections for each")
    parser.add_argument("--look", type=int, default=4, help="tokens of a text in a look")
    parser.add_argument("--look-ms", type=float, default=50.0, help="between two looks")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=3, help="of each connection in a round")
    parser.add_argument("--seconds", type=float, default=2.0, help="that pieces of long texts are counted for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=int, default=0, help="print so many functions of the event loop's profile")
    record.add_argument(parser)
    options = parser.parse_args()
    options.connections = options.slots * options.replicas
    one = Server(options)
    try:
        asyncio.run(load(one.port, options.connections, 1, options.new_tokens, True, seed=-1))
        rows = [measure(one, options, stream) for stream in (True, False)]
    finally:
        one.stop()
    record.write(options.json, {"api-process": rows}, gpus=0)


if __name__ == "__main__":
    main()
