"""Prompts on a CPU: `prefill` beside the model's own forward, in ms of the processor.

    python benchmarks/prompts_cpu.py                       # the embedded model, one thread
    python benchmarks/prompts_cpu.py --threads 8 --json out.json

Contenders run in turn, round after round, and each counts with its best round, so that other work on the machine is not
measured. Times are those of all threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.decoding.prefill import prefill
from mambakit.decoding.slots import SlotPool

SHAPES = ((1, 1), (1, 4), (1, 16), (1, 64), (1, 512), (4, 64), (16, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path()).eval()
    rows = []
    with torch.no_grad():
        for batch, length in SHAPES:
            ids = torch.randint(1, model.config.vocab_size, (batch, length))
            pool = SlotPool(model, batch, model.backbone.new_cache(batch))
            best: dict[str, float] = {}
            for i in range(options.rounds + 1):
                for name in ("forward", "prefill", "a step of as many rows"):
                    cache = model.backbone.new_cache(batch)
                    began = time.process_time()
                    if name == "forward":
                        model(ids, cache_params=cache, logits_to_keep=1)
                    elif name == "prefill":
                        prefill(model, ids, cache)
                    else:
                        pool.step(ids[:, 0])
                    seconds = time.process_time() - began
                    if i:  # the first round warms up
                        best[name] = min(seconds, best.get(name, seconds))
            rows.append({"prompts": f"{batch} x {length}"} | {f"{name}, ms": t * 1e3 for name, t in best.items()})
            print(*rows[-1].values(), flush=True)
    record.write(options.json, {"prompts": rows}, gpus=0, notes=f"Embedded model (int8), {options.threads} threads.")


if __name__ == "__main__":
    main()
