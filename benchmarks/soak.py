"""Many streams at once for a long time: none lost, none wrong, memory flat, tokens at an even pace.

    python benchmarks/soak.py --streams 1000 --minutes 10 --json out.json     # starts a server of the embedded model
    python benchmarks/soak.py --streams 1000 --minutes 1 --replicas 2 --model MODEL

Every stream sends one greedy completion after another over one connection and reads its events. Each text must be,
to the character, the one that the server wrote for that prompt when nothing else ran. First ``--few`` streams run for
``--few-seconds``, then ``--streams`` for ``--minutes``. Printed and recorded for both:

    tokens_per_second   by the server's counter
    gap_p50, gap_p99    seconds between two events of one stream, a token each (several where a step wrote several, or
                        where a character has several tokens)
    first_p50, first_p99   seconds from a request to its first event
    growth_mb           resident memory of server and replicas, the end against the beginning
    lost, wrong         streams that broke off or were refused; texts that were other ones

Prompts are sentences of the project's documentation: after random tokens a model writes bytes that are no text, of
which a server sends nothing until it knows so. Texts have several lengths, so that prompts arrive evenly. The client is
one process that looks for the ends of texts alone while they come, and compares them then. Ends with status 1 where a
stream was lost, a text wrong, or another goal missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.record import ROOT

PROSE = ROOT / "docs" / "concepts" / "how-mamba-works.md"
GROWTH_MB, GAPS, SHARE = 50.0, 3.0, 0.9  # goals: growth, p99 / median, tokens/s of many against few
_END = b"0\r\n\r\n"  # of a chunked response
_EVENT = b"data: {"
_LOST_AFTER = 300.0  # seconds without an event


@dataclass(frozen=True)
class Case:
    """A prompt, and the text that the server writes for it alone."""

    request: bytes
    text: str


@dataclass
class Found:
    """What the streams of one phase have seen."""

    gaps: array = field(default_factory=lambda: array("d"))
    firsts: array = field(default_factory=lambda: array("d"))
    texts: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """A connection that asks for one text after another.

    Args:
        cases: what it asks for, without end.
        found: where it notes what comes.
        phase: whether times are noted now.
    """

    def __init__(self, cases: Iterator[Case], found: Found, phase: Phase):
        self._cases, self._found, self._phase = cases, found, phase
        self._parts: list[bytes] = []
        self._case: Case | None = None
        self._sent = self.last = 0.0
        self.heard = 0.0  # by `Phase.ran`
        self._begun = False
        self.begun = False  # whether anything has come

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._next()

    def _next(self) -> None:
        if self._phase.stopping:
            self._transport.close()
            return
        self._case, self._parts, self._begun = next(self._cases), [], False
        self._sent = self.last = time.perf_counter()
        self.heard = self._phase.ran
        self._transport.write(self._case.request)

    def data_received(self, data: bytes) -> None:
        now, phase = time.perf_counter(), self._phase
        self._parts.append(data)
        if _EVENT in data:
            if phase.measuring:
                (self._found.gaps if self._begun else self._found.firsts).append(
                    now - (self.last if self._begun else self._sent)
                )
            self._begun = self.begun = True
            self.last, self.heard = now, phase.ran
        if data.endswith(_END):
            whole = b"".join(self._parts)
            if b"data: [DONE]" in whole or not whole.startswith(b"HTTP/1.1 200"):
                self._ended(whole)

    def _ended(self, whole: bytes) -> None:
        assert self._case is not None
        head = whole.partition(b"\r\n")[0]
        if not head.endswith(b"200 OK"):
            self.lose(f"{head!r}: {whole[-300:]!r}")
            return
        text = text_of(whole)
        if text != self._case.text:
            self._found.wrong.append(f"{text!r} instead of {self._case.text!r}")
        self._found.texts += 1
        self._case = None
        self._next()

    def lose(self, why: str) -> None:
        """Note that the stream has broken off."""
        self._found.lost.append(why)
        self._case = None
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._case is not None and not self._phase.stopping:
            self._found.lost.append(f"the connection closed: {error!r} after {b''.join(self._parts)[-200:]!r}")
            self._case = None


@dataclass
class Phase:
    """Whether times are noted, and whether streams end."""

    measuring: bool = False
    stopping: bool = False
    ran: float = 0.0
    """Seconds so far, without those in which this process was stopped."""

    async def sleep(self, seconds: float) -> None:
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        self.ran += min(time.perf_counter() - began, 2 * seconds)


def text_of(response: bytes) -> str:
    """The text of a whole streamed response."""
    body = response.partition(b"\r\n\r\n")[2]
    events = re.findall(rb"data: (\{.*?\})\r?\n", body)
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


class Server:
    """`mambakit serve`, ready, and what its processes take."""

    def __init__(self, options: argparse.Namespace):
        slots = -(-max(options.streams, options.few) // options.replicas)
        command = [
            sys.executable, "-m", "mambakit", "serve", "--port", "0", "--device", options.device,
            "--replicas", str(options.replicas), "--slots", str(options.slots or slots),
            "--max-waiting", str(4 * options.streams), "--max-connections", str(options.streams + 200),
            "--max-unread", str(4 * options.streams), "--log-level", "warning",
            *(["--model", options.model] if options.model else []),
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        found = re.search(r" at (http://([\d.]+):(\d+))", self.process.stdout.readline())
        if found is None:
            sys.exit("the server did not start; its messages are above")
        self.url, self.host, self.port = found[1], found[2], int(found[3])
        end = time.monotonic() + 600
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit("the server did not become ready; its messages are above")
            time.sleep(0.2)
        self.pids = {"server": self.process.pid} | {
            f"replica {one['replica']}": one["pid"] for one in self.get("/health")["replicas"]
        }

    def _ready(self) -> bool:
        try:
            return bool(self.get("/health")["status"] == "ok")
        except TimeoutError:  # a machine that is busy with other work
            return False

    def get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:  # /health of a server that is not ready
            return json.loads(error.read())

    def tokens(self) -> float:
        """Generated so far."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("mambakit_generated_tokens_t"))

    def megabytes(self) -> float:
        return sum(resident(pid) for pid in self.pids.values()) / 1e6

    def cpu_seconds(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self.pids.items()}

    def died(self) -> str:
        """Which replica has been restarted, or ""."""
        return "; ".join(f"{one['error']}" for one in self.get("/health")["replicas"] if one["restarts"])

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()


def ps(pid: int, column: str) -> str:
    return subprocess.run(["ps", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return 1024 * int(ps(pid, "rss") or 0)


def cpu_seconds(pid: int) -> float:
    days, _, rest = ps(pid, "time").rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = 60 * seconds + float(part or 0)
    return seconds + 86400 * float(days or 0)


def make_cases(server: Server, options: argparse.Namespace) -> list[Case]:
    """Prompts, each with the text that is written for it while nothing else runs."""
    words = [word for word in PROSE.read_text(encoding="utf-8").split() if word.strip(".,").isalpha()]
    chance, cases = random.Random(options.seed), []
    for number in range(options.prompts):
        first = chance.randrange(len(words) - options.prompt_words)
        share = (number + 1) / options.prompts  # of the same length they would all end at once
        body = {
            "prompt": " ".join(words[first : first + options.prompt_words]), "temperature": 0,
            "max_tokens": max(1, round(share * options.new_tokens)), "stream": True, "ignore_eos": True,
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        request = urllib.request.Request(
            f"{server.url}/v1/completions", data, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = text_of(b"\r\n\r\n" + response.read())
        cases.append(Case(head.encode() + data, text))
    return cases


def without_end(cases: list[Case], seed: int) -> Iterator[Case]:
    chance = random.Random(seed)
    while True:
        yield chance.choice(cases)


async def run(server: Server, cases: list[Case], count: int, seconds: float, options: argparse.Namespace) -> dict:
    """One phase: ``count`` streams, measured for ``seconds`` from when all have begun and as many texts have ended."""
    loop, found, phase = asyncio.get_running_loop(), Found(), Phase()
    streams = []
    for number in range(count):
        _, stream = await loop.create_connection(
            lambda number=number: Stream(without_end(cases, number), found, phase), server.host, server.port
        )
        streams.append(stream)
        await asyncio.sleep(options.ramp_seconds / count)
    while not (found.texts >= count and all(stream.begun for stream in streams)) and not found.lost:
        await phase.sleep(0.2)
        check_silence(streams, phase)
    memory = [await asyncio.to_thread(server.megabytes)]
    tokens, cpu = await asyncio.to_thread(server.tokens), await asyncio.to_thread(server.cpu_seconds)
    began, own, phase.measuring = time.perf_counter(), time.process_time(), True
    told = began
    while (left := began + seconds - time.perf_counter()) > 0 and not found.lost:
        await phase.sleep(min(left, max(1.0, seconds / 60)))
        memory.append(await asyncio.to_thread(server.megabytes))
        check_silence(streams, phase)
        if time.perf_counter() - told > 60:
            told = time.perf_counter()
            print(f"  {told - began:.0f} s: {found.texts} texts, {memory[-1]:.0f} MB", flush=True)
    phase.measuring = False
    took = time.perf_counter() - began
    written = await asyncio.to_thread(server.tokens) - tokens
    busy = {name: (after - cpu[name]) / took for name, after in server.cpu_seconds().items()}
    busy["client"] = (time.process_time() - own) / took
    phase.stopping = True
    for stream in streams:
        stream._transport.abort()
    await asyncio.sleep(1.0)
    if died := server.died():
        found.lost.append(f"a replica died: {died}")
    gaps, firsts = sorted(found.gaps), sorted(found.firsts)
    last = memory[-max(1, len(memory) // 10) :]
    row = {
        "streams": count, "seconds": took, "texts": found.texts,
        "tokens_per_second": written / took if took > 1 else float("nan"),
        "gap_p50": quantile(gaps, 0.5), "gap_p99": quantile(gaps, 0.99),
        "first_p50": quantile(firsts, 0.5), "first_p99": quantile(firsts, 0.99),
        "memory_mb": memory[0], "growth_mb": statistics.median(last) - memory[0],
        "lost": len(found.lost), "wrong": len(found.wrong),
        **{f"cores_{name.replace(' ', '_')}": cores for name, cores in busy.items()},
    }  # fmt: skip
    show(row)
    for one in (found.lost + found.wrong)[:5]:
        print(f"  {one}")
    return row


def check_silence(streams: list[Stream], phase: Phase) -> None:
    for stream in streams:
        if stream._case is not None and phase.ran - stream.heard > _LOST_AFTER:
            stream.lose(f"no event for {_LOST_AFTER:g} seconds")


def quantile(values: list[float], share: float) -> float:
    """Of sorted values; nan of none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def show(row: dict) -> None:
    cores = ", ".join(f"{name[6:]} {value:.2f}" for name, value in row.items() if name.startswith("cores_"))
    print(
        f"{row['streams']:>6} streams, {row['seconds']:.0f} s: {row['tokens_per_second']:.0f} tokens/s, {row['texts']} "
        f"texts, {row['lost']} lost, {row['wrong']} wrong; between tokens p50 {1e3 * row['gap_p50']:.1f} ms, p99 "
        f"{1e3 * row['gap_p99']:.1f} ms ({row['gap_p99'] / row['gap_p50']:.2f} x); first token p50 "
        f"{row['first_p50']:.2f} s, p99 {row['first_p99']:.2f} s; memory {row['memory_mb']:.0f} MB, "
        f"{row['growth_mb']:+.1f} MB; cores: {cores}",
        flush=True,
    )


def missed(few: dict, many: dict) -> list[str]:
    """The goals that were."""
    share, gaps = many["tokens_per_second"] / few["tokens_per_second"], many["gap_p99"] / many["gap_p50"]
    checks = {
        f"{many['lost'] + few['lost']} streams were lost": many["lost"] + few["lost"] == 0,
        f"{many['wrong'] + few['wrong']} texts were wrong": many["wrong"] + few["wrong"] == 0,
        f"memory grew by {many['growth_mb']:.0f} MB ({GROWTH_MB:g})": many["growth_mb"] < GROWTH_MB,
        f"the 99th percentile between tokens is {gaps:.1f} times the median ({GAPS:g})": gaps <= GAPS,
        f"tokens/s are {share:.2f} of those of {few['streams']} streams ({SHARE:g})": share >= SHARE,
    }
    print(f"tokens/s of {many['streams']} streams to {few['streams']}: {share:.2f}; p99 to median: {gaps:.2f}")
    return [what for what, holds in checks.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--few", type=int, default=16, help="streams to compare with")
    parser.add_argument("--few-seconds", type=float, default=30.0)
    parser.add_argument("--ramp-seconds", type=float, default=2.0, help="in which the streams start")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--slots", type=int, help="of a replica (default: one for each stream)")
    parser.add_argument("--prompts", type=int, default=16, help="different ones")
    parser.add_argument("--prompt-words", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128, help="of the longest text; others have less")
    parser.add_argument("--seed", type=int, default=0)
    record.add_argument(parser)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < options.streams + 100:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, options.streams + 1000), hard))
    server = Server(options)
    try:
        cases = make_cases(server, options)
        few = asyncio.run(run(server, cases, options.few, options.few_seconds, options))
        many = asyncio.run(run(server, cases, options.streams, 60 * options.minutes, options))
    finally:
        server.stop()
    record.write(options.json, {"soak": [few, many]}, gpus=int(options.device.startswith("cuda")) * options.replicas)
    failures = missed(few, many)
    for one in failures:
        print(f"missed: {one}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
