"""Run experiments one after the other within a total time, the most important first.

    python -m experiments --out runs/experiments --data DATA --seconds 700
    python -m experiments --out runs/experiments --data DATA --seconds 300 language genomics

Each runs in a process of its own (one that fails takes nothing with it; its imports are made beforehand) with a part of
the seconds left by its weight; what one does not need goes to the next. The books are tokenised meanwhile. One that
fails with time left is tried once more without CUDA graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# In order of importance, and their weights in the total.
WEIGHTS = {"selective_copying": 0.25, "induction_heads": 0.17, "language": 0.28, "genomics": 0.17, "audio": 0.13}
_LEAST_SECONDS = 5.0  # an experiment with less is not begun


def arguments_of(name: str, options: argparse.Namespace, seconds: float, eager: bool) -> list[str]:
    """One experiment's command line."""
    line = ["--out", str(options.out), "--data", str(options.data), "--budget-seconds", f"{seconds:.1f}"]
    line += ["--device", options.device, "--seeds", *map(str, options.seeds)]
    if name == "language":
        line += ["--tokens-cache", str(options.tokens_cache)]
    return [*line, "--eager"] if eager else line


def worker(name: str, orders: Any) -> None:
    """What a process runs: imports first, then waits for its command line (None: it is not needed)."""
    module = importlib.import_module(f"experiments.{name}")
    line = orders.recv()
    if line is None:
        return
    try:
        module.main(line)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Worker:
    """A process that has made its imports by the time the GPU is free for it."""

    def __init__(self, context: Any, name: str):
        self.name = name
        self.orders, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, line: list[str], limit: float) -> int:
        """The exit code: 0, 1 for an exception, 3 for a process stopped after ``limit`` seconds."""
        try:
            self.orders.send(line)
        except BrokenPipeError:  # it died while importing; its exit code says so
            self.process.join()
        self.process.join(limit)
        if self.process.is_alive():
            print(f"== {self.name}: still running after {limit:.0f} s; stopped (finished runs are kept)", flush=True)
            self.process.terminate()
            self.process.join()
            return 3
        return int(self.process.exitcode or 0)

    def dismiss(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.orders.send(None)
        self.process.join()


def tokenize(line: list[str]) -> None:
    from experiments import language
    from experiments.settings import parse

    language.tokenized(parse(language.Language, line, ""))


def main(arguments: list[str] | None = None, method: str = "spawn") -> int:
    """``method`` starts the processes; "forkserver" is quicker, where several programs are run by one process."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WEIGHTS)}; all when none is given")
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock seconds for all of them together")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data files")
    parser.add_argument("--tokens-cache", type=Path, help="tokenised books (default: books_tokens.npz beside --out)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(WEIGHTS)
    if unknown:
        parser.error(f"unknown experiment {', '.join(sorted(unknown))}; choose of {', '.join(WEIGHTS)}")
    if options.seconds <= 0:
        parser.error(f"--seconds is {options.seconds}; it must be above 0")
    options.tokens_cache = options.tokens_cache or options.out.parent / "books_tokens.npz"
    end = time.monotonic() + options.seconds
    names = [name for name in WEIGHTS if name in (options.names or WEIGHTS)]

    context: Any = multiprocessing.get_context(method)
    tokenizing = None
    if "language" in names and not options.tokens_cache.is_file():
        tokenizing = context.Process(target=tokenize, args=(arguments_of("language", options, 1.0, False),))
        tokenizing.start()
    workers = [Worker(context, name) for name in names]
    failed = []
    for index, (name, ready) in enumerate(zip(names, workers, strict=True)):
        share = WEIGHTS[name] / sum(WEIGHTS[other] for other in names[index:])
        if name == "language" and tokenizing is not None:
            tokenizing.join(max(0.0, end - time.monotonic()))
        left = share * (end - time.monotonic())
        if left < _LEAST_SECONDS:
            print(f"== {name}: no time left", flush=True)
            ready.dismiss()
            failed.append(name)
            continue
        print(f"== {name}: {left:.0f} s", flush=True)

        def limit(share: float = left) -> float:  # experiments keep their time themselves; this is for one that hangs
            return min(1.15 * share + 10, end - time.monotonic() + 5)

        code = ready.run(arguments_of(name, options, left, False), limit())
        left = share * (end - time.monotonic())
        if code == 1 and left > _LEAST_SECONDS and options.device != "cpu":
            print(f"== {name} failed: once more without CUDA graphs, {left:.0f} s", flush=True)
            code = Worker(context, name).run(arguments_of(name, options, left, True), limit())
        if code:
            failed.append(name)
    if tokenizing is not None and tokenizing.is_alive():
        tokenizing.terminate()
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0
