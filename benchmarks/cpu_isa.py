"""A decode step by instruction set and weight format on a CPU: the 130m shape, beside the read bandwidth.

    python benchmarks/cpu_isa.py                       # every set that this processor runs, 2 threads
    python benchmarks/cpu_isa.py --sets avx512vnni avx512 --formats int8 int4 --json out.json

Random weights, the same for all; every round times each contender once, in turn. A figure is the median over rounds;
"best" is the smallest, since other work on the machine only adds to it. The bandwidth is that of a sum over 256 MB,
measured in the same rounds. Nothing is timed whose logits are not near those of the first set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.cpu import decode_step, step_bytes
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.ops._backends import native

FORMATS = ("float32", "bfloat16", "int8", "int4")
STEPS = 8  # per timing


def seconds_of(call: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", nargs="+", choices=native.supported(), default=native.supported())
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)).eval()
    buffer, x = torch.ones(2**26), torch.randn(1, 768)
    rows = []
    with torch.no_grad():
        for format in options.formats:
            steps = {}
            for isa in options.sets:
                native.use_isa(isa)
                steps[isa] = decode_step(model, format)
            logits = {isa: step(x) for isa, step in steps.items()}
            first = logits[options.sets[0]]
            for isa, own in logits.items():
                error = ((own - first).norm() / first.norm()).item()
                assert error < 1e-4, f"{isa}: logits are {error:.1e} from those of {options.sets[0]}: nothing is timed"
            times: dict[str, list[float]] = {name: [] for name in ("read", *steps)}
            for i in range(options.rounds + 1):
                found = {"read": seconds_of(buffer.sum, 1)}
                for isa, step in steps.items():
                    found[isa] = seconds_of(lambda step=step: step(x), STEPS)
                for name, seconds in found.items():
                    times[name] += [seconds] if i else []  # the first round warms up
            bandwidth = buffer.nbytes / statistics.median(times["read"])
            for isa, step in steps.items():
                median, best = statistics.median(times[isa]), min(times[isa])
                share = step_bytes(step) / median / bandwidth
                against = statistics.median(a / b for a, b in zip(times[options.sets[0]], times[isa], strict=True))
                rows.append(
                    {
                        "format": format, "set": isa, "seconds": median, "best_seconds": best,
                        "share_of_bandwidth": share, "time_over_first": 1 / against, "bandwidth": bandwidth,
                    }
                )  # fmt: skip
                print(
                    f"{format:9} {isa:11} {median * 1e3:6.2f} ms, best {best * 1e3:6.2f}; {share:4.0%} of "
                    f"{bandwidth / 1e9:.1f} GB/s; {1 / against:.2f} times {options.sets[0]}"
                )
    record.write(options.json, {"rows": rows}, gpus=0, notes=str(native.describe()["supported"]))


if __name__ == "__main__":
    main()
