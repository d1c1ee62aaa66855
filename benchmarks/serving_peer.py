"""mambakit's server beside llama.cpp's, with the same GGUF weights and the same load.

    python benchmarks/serving_peer.py --peer /path/to/llama-server --gguf mamba-130m-q8_0.gguf --json out.json
    python benchmarks/serving_peer.py --peer /path/to/llama-server            # the embedded model, as Q8_0

``--peer`` is llama.cpp's own server (b5000 or later), built for a CPU: `cmake -B build && cmake --build build --target
llama-server`. Both get ``--threads`` threads and ``--slots`` slots. In turn, each of them alone on the machine:

    tokens_per_second, first_token_p50, first_token_p99    `--requests` greedy streams, `--concurrency` at a time
    idle_mb                   resident memory that each of ``--conversations`` idle conversations adds. Of mambakit's
                              server they are states in the memory of the replica; of llama.cpp's server slots that
                              hold their context of ``--context`` tokens, one for each conversation

Prompts are random tokens of the same numbers, and `ignore_eos` is sent to both, so that texts have their full length.
Tokens are counted by the servers' usage fields.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.record import ROOT
from benchmarks.serving import load, prompts, summary
from benchmarks.soak import resident

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str, log: Path) -> Iterator[subprocess.Popen]:
    """A server's process, ready as soon as GET ``ready`` is 200."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths}
        )
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                if ask(port, "GET", ready)[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{command[0]} did not become ready: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def mambakit_command(gguf: Path, port: int, options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "mambakit", "serve", "--model", str(gguf), "--device", "cpu", "--port", str(port),
        "--slots", str(options.slots), "--max-waiting", "100000", "--max-new-tokens", str(options.new_tokens),
        "--states", str(folder), "--states-memory-mb", "4096", "--log-level", "warning",
    ]  # fmt: skip


def peer_command(gguf: Path, port: int, options: argparse.Namespace, slots: int) -> list[str]:
    return [
        options.peer, "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1", "-t", str(options.threads),
        "-tb", str(options.threads), "-np", str(slots), "-c", str(slots * options.context), "-cb",
    ]  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found


def memory(process: subprocess.Popen) -> float:
    """Megabytes of a server's processes."""
    return sum(map(resident, tree(process.pid))) / 1e6


def throughput(port: int, who: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one server, of requests as `serving.py` sends them."""
    server: Any = SimpleNamespace(host="127.0.0.1", port=port)
    load(server, options, options.concurrency, min(8, options.new_tokens), GREEDY, seed=1)
    print(f"{who}: ", end="")
    row = summary(load(server, options, options.requests, options.new_tokens, GREEDY, seed=2), 1, GREEDY, 0.0)
    wanted = ("requests_per_second", "tokens_per_second", "first_token_p50", "first_token_p99", "seconds")
    return {"server": who, **{name: row[name] for name in wanted}}


def of_mambakit(gguf: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    port = free_port()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with running(mambakit_command(gguf, port, options, folder / "states"), port, "/readyz", folder / "log") as process:
        row = throughput(port, "mambakit", options)
        before = memory(process)
        for ids in prompts(options.conversations, options, seed=3):
            status, answer = ask(port, "POST", "/v1/states", {"prompt": ids})
            assert status == 200, answer
        return row | {"idle_mb": (memory(process) - before) / options.conversations}


def of_peer(gguf: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    port = free_port()
    with running(peer_command(gguf, port, options, options.slots), port, "/health", folder / "peer") as process:
        row = throughput(port, "llama.cpp", options)
        few = memory(process)
    many = options.slots + options.conversations
    with running(peer_command(gguf, port, options, many), port, "/health", folder / "peer") as process:
        for slot, ids in enumerate(prompts(options.conversations, options, seed=3)):
            body = {"prompt": ids, "n_predict": 1, "id_slot": options.slots + slot, "cache_prompt": True}
            status, answer = ask(port, "POST", "/completion", body)
            assert status == 200, answer
        return row | {"idle_mb": (memory(process) - few) / options.conversations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="FILE", help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="the model (default: the embedded one, as Q8_0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--concurrency", type=int, help="requests at a time (default: the slots)")
    parser.add_argument("--requests", type=int, help="in all (default: four times the concurrency)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a slot of llama.cpp's server")
    parser.add_argument("--clients", type=int, default=1, help="processes that send")
    record.add_argument(parser)
    options = parser.parse_args()
    options.concurrency = options.concurrency or options.slots
    options.requests = options.requests or 4 * options.concurrency
    options.vocabulary = 500
    found = subprocess.run([options.peer, "--version"], capture_output=True, text=True)
    version = re.search(r"version: (.*)", found.stdout + found.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gguf = options.gguf or folder / "model.gguf"
        if options.gguf is None:
            from mambakit.assets import default_model_path

            command = [sys.executable, "-m", "mambakit", "convert", str(default_model_path()), str(gguf)]
            subprocess.run([*command, "--dtype", "q8_0"], check=True, cwd=ROOT)
        rows = [of_mambakit(gguf, options, folder), of_peer(gguf, options, folder)]
    for row in rows:
        print(json.dumps(row))
    record.write(options.json, {"peers": rows}, gpus=0, llama_cpp=version[1] if version else "unknown")


if __name__ == "__main__":
    main()
