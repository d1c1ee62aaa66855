"""What a long prompt costs other texts: a new text's first token, and the gaps between tokens. On a CPU.

    python benchmarks/long_prompt.py                            # the embedded model, a prompt of 10,000 tokens
    python benchmarks/long_prompt.py --tokens 50000 --prefix-cache --writers 8

Times are CPU seconds of one thread, so that other work on the machine is not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache

clock = time.process_time


class Watched:
    """An engine with ``writers`` texts under way, and the gaps between their tokens."""

    def __init__(self, engine: Engine, writers: int):
        self.engine = engine
        self.writers = [
            engine.submit(Request(torch.randint(1, 500, (8,)), max_new_tokens=10**9)) for _ in range(writers)
        ]
        self.last: dict[int, float] = {}
        self.gaps: list[float] = []

    def run(self, *, seconds: float | None = None, until: Request | None = None) -> float:
        """Step for so long, or until this request has ended; returns how long it took."""
        began = clock()
        while not until.finish_reason if until else clock() - began < (seconds or 0):
            for request, _ in self.engine.step():
                if request in self.writers:
                    now = clock()
                    if id(request) in self.last:
                        self.gaps.append(now - self.last[id(request)])
                    self.last[id(request)] = now
        return clock() - began

    def newcomer(self) -> float:
        return self.run(until=self.engine.submit(Request(torch.tensor([5]), max_new_tokens=1)))

    def gap(self) -> float:
        """The 90th percentile since it was asked last."""
        gaps, self.gaps = sorted(self.gaps), []
        return gaps[len(gaps) * 9 // 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub id or folder (default: the embedded model)")
    parser.add_argument("--tokens", type=int, default=10_000, help="of the long prompt")
    parser.add_argument("--writers", type=int, default=4, help="texts under way")
    parser.add_argument("--prefix-cache", action="store_true")
    record.add_argument(parser)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mambakit.AutoModelForCausalLM.from_pretrained(args.model or default_model_path(), dtype="float32").eval()
    model.generation_config.eos_token_id = None
    cache = PrefixCache(model) if args.prefix_cache else None
    watched = Watched(Engine(model, prefix_cache=cache, clock=clock), args.writers)
    watched.run(seconds=2)
    watched.gap()
    watched.run(seconds=2)
    result = {"idle_gap": watched.gap(), "idle_newcomer": watched.newcomer()}
    long = watched.engine.submit(Request(torch.randint(1, 500, (args.tokens,)), max_new_tokens=1))
    watched.gap()
    before = watched.run(seconds=0.5)
    result["newcomer"] = watched.newcomer()
    result["long_prompt"] = before + result["newcomer"] + watched.run(until=long)
    result["gap"] = watched.gap()
    print(json.dumps({name: round(seconds, 4) for name, seconds in result.items()}))
    gap = "gap_prefix_cache" if args.prefix_cache else "gap"
    rows = [
        {"how": "nobody reads", "newcomer": result["idle_newcomer"], gap: result["idle_gap"]},
        {"how": "now", "newcomer": result["newcomer"], gap: result["gap"], "long_prompt": result["long_prompt"]},
    ]
    record.write(args.json, {"long_prompt": rows}, gpus=0)


if __name__ == "__main__":
    main()
