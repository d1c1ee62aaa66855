"""Time from a prompt to what comes first: `generate`'s first token beside states, prefix cache, streams and the engine.

    python benchmarks/first_token.py --json out.json            # one NVIDIA GPU, bfloat16
    python benchmarks/first_token.py --device cpu --shapes tiny # a CPU
    python benchmarks/first_token.py --lengths --batches 2x32 8x128 8x512   # `generate` of padded batches alone

Random weights and tokens, one prompt at a time, wall clock with the device's work finished, median of --rounds. All
read the prompt by the same prefill: on a GPU by CUDA graphs, which exist before anything is timed. The prefix cache
knows none of the prompts. The server's replicas read prompts with the engine. --batches: rows of half to all of so many
tokens, padded on their left, as `generate` reads them and packed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.generation import SHAPES, VOCABULARY, mamba, released
from mambakit.decoding import prefill
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream

GREEDY = Sampling(temperature=0)


class Letters:
    """Stands for a tokenizer: random weights have no text."""

    def decode(self, ids, **_) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


def contenders(model) -> dict[str, Callable[[torch.Tensor], object]]:
    """What each does with a prompt (l,) int64 on the CPU."""
    cache, engine = PrefixCache(model, memory_bytes=1 << 28), Engine(model, 8)

    def generated(ids: torch.Tensor) -> object:
        prompt = ids[None].to(model.device)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)

    return {
        "generate": generated,
        "State.read": lambda ids: State.read(model, ids),
        "PrefixCache.read": cache.read,
        "Stream": lambda ids: next(iter(Stream(model, Letters(), ids, GREEDY, max_new_tokens=1))),
        "Engine": lambda ids: engine.write([Request(ids, GREEDY, 1)]),
    }


def padded(model, rows: int, longest: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """`generate` of prompts (rows, longest) with padding on their left: as it reads them, and packed."""
    lengths = torch.randint(longest // 2, longest + 1, (rows, 1), generator=torch.Generator().manual_seed(0))
    lengths[0] = longest
    mask = (torch.arange(longest) >= longest - lengths).long().to(model.device)

    def generated(ids: torch.Tensor) -> object:
        prompt = ids.to(model.device)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)

    def packed(ids: torch.Tensor) -> object:
        with patch.object(prefill, "takes_padding", lambda model: False):
            return generated(ids)

    return {"generate": generated, "generate, packed": packed}


def milliseconds(run: Callable[[torch.Tensor], object], size: tuple[int, ...], rounds: int, cuda: bool) -> float:
    times = []
    for prompt in torch.randint(1, VOCABULARY, (rounds + 3, *size)):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(prompt)
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])  # before: kernels are compiled, graphs captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["130m", "1.4b"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[64, 512])
    parser.add_argument("--batches", nargs="*", default=[], metavar="ROWSxTOKENS", help="padded ones, none by default")
    parser.add_argument("--rounds", type=int, default=20)
    record.add_argument(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --device cpu --shapes tiny tries the script without one")
    cuda, rows = options.device == "cuda", []
    print(f"{'shape':6} {'tokens':>6} {'who':18} {'ms':>8}")
    for shape in options.shapes:
        model = mamba(shape, options.device)
        for length in options.lengths:
            for who, run in contenders(model).items():
                took = milliseconds(run, (length,), options.rounds, cuda)
                print(f"{shape:6} {length:>6} {who:18} {took:8.2f}", flush=True)
                rows.append({"shape": shape, "tokens": length, "who": who, "ms": took})
        for batch in options.batches:
            size = tuple(map(int, batch.split("x")))
            for who, run in padded(model, *size).items():
                took = milliseconds(run, size, options.rounds, cuda)
                print(f"{shape:6} {batch:>6} {who:18} {took:8.2f}", flush=True)
                rows.append({"shape": shape, "tokens": batch, "who": who, "ms": took})
        del model
        released()
    record.write(options.json, {"first_token": rows}, gpus=int(cuda))


if __name__ == "__main__":
    main()
