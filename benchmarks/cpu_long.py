"""Long inputs on a CPU: time by length, and one million tokens read in constant memory, then decoded from.

    python benchmarks/cpu_long.py --json out.json               # 130m shape, 2 threads: about 25 minutes
    python benchmarks/cpu_long.py --tokens 100000 --most 14     # a shorter look

Random weights and tokens. Time is fitted as time = a + b * length, a line through the relative errors; `off` is the
worst distance of a measured time from it. Decode times at position 1,000 and at the last one are taken in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.decoding.registry import token_step


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read(model: MambaForCausalLM, ids: torch.Tensor, cache, chunk: int, watch=lambda done: None) -> None:
    done = 0
    for part in ids.split(chunk, 1):
        model(part, cache_params=cache, logits_to_keep=1)
        done += part.shape[1]
        watch(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=17, help="lengths are 2^9 to 2^MOST")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=options.hidden_size, num_hidden_layers=options.layers, vocab_size=50280)
    model = MambaForCausalLM(config).eval()
    result: dict[str, list[dict]] = {"lengths": [], "long": []}
    with torch.no_grad():
        read(model, torch.randint(0, 50280, (1, 2 * options.chunk)), model.backbone.new_cache(1), options.chunk)
        if options.most >= 9:
            lengths = [2**i for i in range(9, options.most + 1)]
            seconds = []
            for length in lengths:
                ids = torch.randint(0, 50280, (1, length))
                times = []
                for _ in range(3 if length <= 2**14 else 1):
                    begin = time.perf_counter()
                    read(model, ids, model.backbone.new_cache(1), options.chunk)
                    times.append(time.perf_counter() - begin)
                seconds.append(statistics.median(times))
                print(f"  {length:7d} tokens {seconds[-1]:8.2f} s  {length / seconds[-1]:8.0f} tokens/s", flush=True)
            # Least squares of (a + b l) / t against 1: every length counts the same.
            system = np.array([[1 / t, n / t] for n, t in zip(lengths, seconds, strict=True)])
            a, b = np.linalg.lstsq(system, np.ones(len(lengths)), rcond=None)[0]
            off = max(abs((a + b * n) / t - 1) for n, t in zip(lengths, seconds, strict=True))
            result["lengths"] = [{"tokens": n, "seconds": t} for n, t in zip(lengths, seconds, strict=True)]
            result["lengths"].append({"tokens": None, "worst_distance_from_a_line": off})
            print(f"time by length: at most {off:.1%} off a line", flush=True)
        if options.tokens:
            ids = torch.randint(0, 50280, (1, options.tokens))
            early, cache = model.backbone.new_cache(1), model.backbone.new_cache(1)
            read(model, ids[:, :1000], early, options.chunk)
            memory: list[float] = []
            every = max(1, options.tokens // 10)

            def watch(done: int) -> None:
                memory.append(resident_megabytes())
                if done // every > (done - options.chunk) // every:
                    growth = memory[-1] - memory[0]
                    print(f"  {done:8d} tokens read, {growth:+.1f} MB resident since the first chunk", flush=True)

            begin = time.perf_counter()
            read(model, ids, cache, options.chunk, watch)
            rate = options.tokens / (time.perf_counter() - begin)
            growth = max(memory) - memory[0]
            steps = {"early": token_step(model, early), "late": token_step(model, cache)}
            times: dict[str, list[float]] = {name: [] for name in steps}
            token = torch.zeros(1, dtype=torch.int64)
            for i in range(66):
                for name, step in steps.items():
                    begin = time.perf_counter()
                    step(token)
                    if i >= 2:
                        times[name].append(time.perf_counter() - begin)
            ratio = statistics.median(times["late"]) / statistics.median(times["early"])
            result["long"].append(
                {
                    "tokens": options.tokens,
                    "chunk": options.chunk,
                    "tokens_per_second": rate,
                    "growth_mb": growth,
                    "decode_late_to_early": ratio,
                }
            )
            print(f"{options.tokens} tokens at {rate:.0f} tokens/s; resident memory grew by at most {growth:.1f} MB")
            print(f"decode at position {options.tokens} takes {ratio:.3f} of its time at position 1000")
    record.write(options.json, result, gpus=0)


if __name__ == "__main__":
    main()
