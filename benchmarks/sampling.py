"""Choosing a token of each row of logits: the sampling op beside transformers' processors and torch.multinomial.

    python benchmarks/sampling.py --json out.json               # one NVIDIA GPU
    python benchmarks/sampling.py --device cpu --rows 1 16      # a CPU

Random logits of the size of a vocabulary of 50,280. The op's time is that of its launch (CUDA events, median), and with
the host's work around it, random numbers and reading the tokens included (`Sampler.choose`, wall clock). Nothing is
timed before the op draws what its float64 reference draws.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import generation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.decoding.sampler import SampledText, Sampler
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.ops.sampling import reference
from mambakit.ops.sampling.api import sample

VOCABULARY = 50_280
CASES = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "top_k 50": SamplingParams(top_k=50),
    "temperature 0.8, top_p 0.95": SamplingParams(0.8, top_p=0.95),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "typical_p 0.9": SamplingParams(typical_p=0.9),
    "repetition_penalty 1.2": SamplingParams(repetition_penalty=1.2),
}


def theirs(params: SamplingParams, logits: torch.Tensor, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    processors = generation.LogitsProcessorList()
    for used, make in (
        (
            params.repetition_penalty != 1,
            lambda: generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        ),
        (params.temperature not in (0, 1), lambda: generation.TemperatureLogitsWarper(params.temperature)),
        (params.top_k, lambda: generation.TopKLogitsWarper(params.top_k)),
        (params.top_p < 1, lambda: generation.TopPLogitsWarper(params.top_p)),
        (params.min_p, lambda: generation.MinPLogitsWarper(params.min_p)),
        (params.typical_p < 1, lambda: generation.TypicalLogitsWarper(params.typical_p)),
    ):
        if used:
            processors.append(make())

    def choose() -> torch.Tensor:
        scores = processors(ids, logits)
        return scores.argmax(-1) if params.greedy else torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return choose


def launch_seconds(run: Callable[[], object], cuda: bool, rounds: int) -> float:
    """Of the device alone on a GPU: enough calls are queued behind one another that the host's time does not show."""
    run()
    times = []
    for _ in range(rounds):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            times.append(wall_seconds(run, 1))
    return statistics.median(times)


def wall_seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(rows: int, device: torch.device, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, device=device) * 3
    ids = torch.randint(0, VOCABULARY, (rows, 200), device=device)
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    found = []
    for label, params in CASES.items():
        parameters = torch.tensor([params.columns] * rows, dtype=torch.float32, device=device)
        same = sample(logits, uniform, parameters) == reference.sample(logits, uniform, parameters)
        assert same.float().mean() > 0.98, f"{label}: {int((~same).sum())} of {rows} tokens are not the reference's"
        sampler, chosen = Sampler(), theirs(params, logits, ids)
        texts = [SampledText(params, VOCABULARY, device, prompt) for prompt in ids]
        sampler.choose(logits, texts)
        chosen().tolist()
        op = launch_seconds(lambda p=parameters: sample(logits, uniform, p), device.type == "cuda", rounds)
        choose = wall_seconds(lambda s=sampler, t=texts: s.choose(logits, t), rounds)
        peer = wall_seconds(lambda c=chosen: c().tolist(), rounds)
        print(f"{rows:>4} {label:30} {op * 1e6:8.0f} {choose * 1e6:8.0f} {peer * 1e6:13.0f}", flush=True)
        found.append({"rows": rows, "how": label, "op": op, "choose": choose, "transformers": peer})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=50)
    record.add_argument(parser)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --device cpu measures the CPU")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, vocabulary {VOCABULARY:,}; microseconds")
    print(f"{'rows':>4} {'how':30} {'op':>8} {'choose':>8} {'transformers':>13}")
    rows = [row for count in options.rows for row in measure(count, device, options.rounds)]
    record.write(options.json, {"sampling": rows}, gpus=int(cuda))


if __name__ == "__main__":
    main()
