"""Time to the first token of a conversation's next turn, from a state that was kept on a server.

After few and after many tokens: from a replica's memory, on the other replica, and after server and replicas were
killed. States of both lengths take turns, so that whatever else the machine does disturbs both alike.

    python benchmarks/second_turn.py [--lengths 1000 50000] [--turns 40] [--model MODEL] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record


class Server:
    """`mambakit serve` with two replicas."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        command = [sys.executable, "-m", "mambakit", "serve", "--port", "0", "--replicas", "2", "--states", str(folder)]
        command += ["--device", options.device, "--max-prompt-tokens", "1000000", "--max-body-mb", "64"]
        command += ["--model", options.model] if options.model else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r" at (http://[^,]+),", self.process.stdout.readline())
        assert found is not None, "the server did not start"
        self.client = httpx.Client(base_url=found[1], timeout=1800)
        while self.health()["status"] != "ok":
            time.sleep(0.1)

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        return self.client.post(path, json=body).raise_for_status().json()

    def first_token(self, state: str, prompt: list[int]) -> float:
        """Seconds from the request to its first event."""
        body = {"prompt": prompt, "state": state, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
        began = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            seconds = time.perf_counter() - began
            for _ in lines:
                pass
        return seconds

    def kill(self) -> None:
        """SIGKILL, server and replicas."""
        pids = [self.process.pid, *(replica["pid"] for replica in self.health()["replicas"])]
        self.client.close()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def measure(options: argparse.Namespace, folder: Path) -> dict[tuple[str, int], list[float]]:
    """(where the state is, tokens before the turn) -> seconds of each turn."""
    turn = [5, 6, 7, 8, 9, 10, 11, 12]
    found: dict[tuple[str, int], list[float]] = {}
    server = Server(folder, options)
    try:
        states: dict[int, list[str]] = {}
        for length in options.lengths:
            base = server.post("/v1/states", prompt=[100 + i * i % 777 for i in range(length - 1)])["id"]
            made = [server.post("/v1/states", prompt=[50 + i], state=base)["id"] for i in range(options.turns)]
            states[length] = made
        for number in range(options.turns):
            for length in options.lengths:
                server.first_token(states[length][number], turn)  # whichever replica it goes to has it now
                found.setdefault(("in memory", length), []).append(server.first_token(states[length][number], turn))
        server.kill()
        server = Server(folder, options)
        for _ in range(20):
            server.post("/v1/completions", prompt=turn, max_tokens=2)
        for number in range(options.turns):
            for length in options.lengths:
                seconds = server.first_token(states[length][number], turn)
                found.setdefault(("killed and restarted, or another replica", length), []).append(seconds)
    finally:
        server.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 50000], metavar="TOKENS")
    parser.add_argument("--turns", type=int, default=40, help="of each length and place")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--device", default="cpu")
    record.add_argument(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    rows = [
        {
            "state": where, "tokens": length, "turns": len(seconds), "least_seconds": min(seconds),
            "median_seconds": statistics.median(seconds),
        }
        for (where, length), seconds in found.items()
    ]  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    record.write(options.json, {"turns": rows}, gpus=2 if options.device.startswith("cuda") else 0)


if __name__ == "__main__":
    main()
