"""The engine over random schedules: requests, errors, cancellations, shares, caches; each text must be that of an
engine which has nothing else to do, and nothing may be left over.

    python benchmarks/fuzz_engine.py --schedules 10000                       # divided between all ways to decode
    python benchmarks/fuzz_engine.py --schedules 1 --seed 4711 --ways graph  # one that failed, again

A schedule is that of `tests/generation/test_engine_schedules.py`, whose first 100 of each way are in the suite, made
from its seed alone. Each failure is printed with its seed and way. Ends with status 1 where there was one.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

from tests.decoding.eager_graph import WAYS, decode_by, read_in_buckets
from tests.generation.test_engine_schedules import MODELS, schedule

ALL = (*WAYS, "falcon", "buckets")


def run(way: str, seeds: range) -> list[str]:
    """The failures of these schedules, each decoded ``way``."""
    failures, told = [], time.monotonic()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if way == "buckets":
            decode_by("graph", patch)
            read_in_buckets(patch)
        elif way != "falcon":
            decode_by(way, patch)
        for seed in seeds:
            try:
                schedule(seed, MODELS["falcon" if way == "falcon" else "native"], way)
            except Exception:
                failures.append(f"--seed {seed} --ways {way}\n{traceback.format_exc(limit=-3)}")
                print(f"failed: {failures[-1]}", flush=True)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{way}: up to seed {seed}, {len(failures)} failures", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000, help="of all ways together")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule of each way")
    parser.add_argument("--ways", nargs="+", choices=ALL, default=ALL)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    began, failures, count = time.monotonic(), [], 0
    for number, way in enumerate(options.ways):
        mine = options.schedules // len(options.ways) + (number < options.schedules % len(options.ways))
        failures += run(way, range(options.seed, options.seed + mine))
        count += mine
        print(f"{way}: seeds {options.seed} to {options.seed + mine - 1}", flush=True)
    print(f"{count} schedules in {time.monotonic() - began:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
