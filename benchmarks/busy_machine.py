"""What a bound on OpenMP's spinning costs on a quiet machine, and gains on one that others use.

    python benchmarks/busy_machine.py --json busy.json          # about 4 minutes; nothing else may run
    python benchmarks/busy_machine.py --neighbours 2 --spins 0 10000 300000

A process for each bound (`GOMP_SPINCOUNT`; 300,000 is GNU's own, without a bound) loads torch, then waits; in each
round every one of them is measured in turn, alone and beside ``--neighbours`` processes that never rest. Three cases,
each for ``--seconds``: optimiser steps of configs/tiny.toml, a prompt of 512 tokens and 64 tokens one after the other
with the embedded model. Figures are tokens per second: the median over rounds, and the worst round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.record import ROOT

CASES = ("training", "prompt", "decode")
SITUATIONS = ("quiet", "busy")


def cases() -> dict[str, tuple[int, Callable[[], object]]]:
    """Tokens of a call, and the call."""
    import torch

    import mambakit
    from mambakit.assets import default_model_path
    from mambakit.training.config_file import load_config
    from mambakit.training.optimizer import make_optimizer
    from mambakit.training.step import TrainingStep

    torch.manual_seed(0)
    config = load_config(ROOT / "configs" / "tiny.toml", [])
    shape = mambakit.MambaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers
    )
    learner = mambakit.MambaForCausalLM(shape).train()
    step = TrainingStep(learner, make_optimizer(learner, 1e-4, (0.9, 0.95), 0.1), 1.0, "float32", False)
    rows = torch.randint(1, config.vocab_size, (config.batch_size, config.sequence_length + 1))
    begins = torch.zeros_like(rows, dtype=torch.bool)
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32).eval()
    prompt = torch.randint(1, model.config.vocab_size, (1, 512))

    def write(ids: torch.Tensor, count: int) -> Callable[[], object]:
        return lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return {
        "training": (config.batch_size * config.sequence_length, lambda: step.run(rows, begins)),
        "prompt": (512, write(prompt, 1)),
        "decode": (64, write(prompt[:, :4], 64)),
    }


def worker(seconds: float) -> None:
    """Measure whenever a line comes in; a line of JSON goes out."""
    made = cases()
    for _, call in made.values():
        call()
        call()
    print("{}", flush=True)
    for _ in sys.stdin:
        rates = {}
        for name, (tokens, call) in made.items():
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < seconds:
                call()
                count += 1
            rates[name] = tokens * count / (time.perf_counter() - began)
        print(json.dumps(rates), flush=True)


def start(spins: int, seconds: float) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", "--seconds", str(seconds)], env={**environment, "GOMP_SPINCOUNT":
        str(spins)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ask(process: subprocess.Popen) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a measuring process ended with status {process.wait()}")
    return json.loads(line)


def measure(bounds: list[int], neighbours: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    workers = {}
    for spins in bounds:
        workers[spins] = start(spins, seconds)
        answer(workers[spins])  # ready: one after the other, so that none warms up beside another's measurement
    records = []
    try:
        for number in range(rounds):
            for situation in SITUATIONS:
                count = neighbours if situation == "busy" else 0
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
                try:
                    for spins, process in workers.items():
                        rates = ask(process)
                        records += [
                            {
                                "round": number,
                                "situation": situation,
                                "spins": spins,
                                "case": case,
                                "tokens_per_second": rate,
                            }
                            for case, rate in rates.items()
                        ]
                        print(f"round {number}, {situation}, {spins}: {rates}", file=sys.stderr, flush=True)
                finally:
                    for process in busy:
                        process.kill()
                        process.wait()
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return records


def medians(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates: dict[tuple[int, str, str], list[float]] = {}
    for one in records:
        rates.setdefault((one["spins"], one["case"], one["situation"]), []).append(one["tokens_per_second"])
    return [
        {"spins": spins, "case": case, "situation": situation, "median": statistics.median(found), "worst": min(found)}
        for (spins, case, situation), found in rates.items()
    ]


def table(records: list[dict[str, Any]], bounds: list[int]) -> str:
    lines = ["| GOMP_SPINCOUNT | " + " | ".join(f"{case}, {s}" for case in CASES for s in SITUATIONS) + " |"]
    lines.append("|---" * (1 + len(CASES) * len(SITUATIONS)) + "|")
    for spins in bounds:
        cells = []
        for case in CASES:
            for situation in SITUATIONS:
                wanted = (spins, case, situation)
                found = next(r for r in medians(records) if (r["spins"], r["case"], r["situation"]) == wanted)
                cells.append(f"{found['median']:,.0f} ({found['worst']:,.0f})")
        lines.append(f"| {spins:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[0, 300, 1_000, 3_000, 10_000, 300_000])
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each case; a call that has begun is finished")
    record.add_argument(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.seconds)
        return
    began = time.monotonic()
    records = measure(arguments.spins, arguments.neighbours, arguments.rounds, arguments.seconds)
    print(table(records, arguments.spins))
    print(f"\n{arguments.rounds} rounds beside {arguments.neighbours} neighbours, {time.monotonic() - began:.0f} s")
    record.write(arguments.json, {"medians": medians(records), "rounds": records}, gpus=0)


if __name__ == "__main__":
    main()
