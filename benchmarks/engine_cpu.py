"""The engine beside `generate` with the same prompts, on a CPU: tokens/s by batch, greedy and sampled.

    python benchmarks/engine_cpu.py                      # the embedded model, 64 + 48 tokens, batches 1, 4, 8 and 16
    python benchmarks/engine_cpu.py --threads 8 --json out.json
    python benchmarks/engine_cpu.py --threads 1 --processor-time   # on a machine with other work

The engine is made once, as a server does; both read the prompts of random tokens and write to the full length.
"sampled": temperature 1. `generate` samples as transformers does, from torch's global generator; "seeds" is
`generate(seed=[...])`, whose random numbers are the engine's. Contenders run in turn, round after round, and each
counts with its best round, so that other work on the machine is not measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.engine import Engine, Request


def best(
    contenders: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    times = dict.fromkeys(contenders, float("inf"))
    for i in range(rounds + 1):
        for name, run in contenders.items():
            began = clock()
            run()
            if i:  # the first round warms up
                times[name] = min(times[name], clock() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, in place of wall time")
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path()).eval()
    model.generation_config.eos_token_id = None
    rows = []
    print(f"{'batch':>5} {'how':8} {'engine':>8} {'generate':>9} {'seeds':>8}  tokens/s; engine's time / generate's")
    for batch in map(int, options.batches.split(",")):
        ids = torch.randint(1, model.config.vocab_size, (batch, options.prompt))
        engine = Engine(model, batch)

        def by_engine(temperature: float, engine=engine, ids=ids) -> list[Request]:
            sampling = [SamplingParams(temperature=temperature, seed=i) for i in range(len(ids))]
            requests = zip(ids, sampling, strict=True)
            return engine.write([Request(row, one, max_new_tokens=options.new) for row, one in requests])

        def by_generate(sample: bool, seeds: bool = False, ids=ids) -> torch.Tensor:
            more = {"temperature": 1.0, "top_k": 0} if sample else {}
            more |= {"seed": list(range(len(ids)))} if seeds else {}
            return model.generate(ids, max_new_tokens=options.new, do_sample=sample, pad_token_id=0, **more)

        written = [request.tokens for request in by_engine(0.0)]
        assert written == by_generate(False)[:, options.prompt :].tolist(), "other tokens: nothing is timed"
        times = best(
            {
                "greedy engine": lambda run=by_engine: run(0.0),
                "greedy generate": lambda run=by_generate: run(False),
                "sampled engine": lambda run=by_engine: run(1.0),
                "sampled generate": lambda run=by_generate: run(True),
                "sampled seeds": lambda run=by_generate: run(True, seeds=True),
            },
            options.rounds,
            time.process_time if options.processor_time else time.perf_counter,
        )
        for how in ("greedy", "sampled"):
            names = ("engine", "generate", "seeds") if how == "sampled" else ("engine", "generate")
            speeds = {name: batch * options.new / times[f"{how} {name}"] for name in names}
            ratio = times[f"{how} engine"] / times[f"{how} generate"]
            rows.append({"batch": batch, "how": how, **speeds, "engine_over_generate": ratio})
            seeds = f"{speeds['seeds']:8.0f}" if "seeds" in speeds else " " * 8
            print(
                f"{batch:5} {how:8} {speeds['engine']:8.0f} {speeds['generate']:9.0f} {seeds}  {ratio:.2f}", flush=True
            )
    clock = "processor's seconds" if options.processor_time else "seconds"
    record.write(options.json, {"rows": [row | {"threads": options.threads, "clock": clock} for row in rows]}, gpus=0)


if __name__ == "__main__":
    main()
