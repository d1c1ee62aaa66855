"""What is saved by not reading again: prefix cache, forks, tokens verified together and states replayed. On a CPU.

    python benchmarks/reuse.py                      # one thread; every figure is a ratio of times taken in turn
    python benchmarks/reuse.py --threads 8 --json out.json

Contenders run in turn, round after round; each counts with its best round, so that other work on the machine is not
measured. The embedded model serves where words matter; random weights of the 130m shape where a step's cost does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.decoding.registry import token_step, verifier
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.score import score_continuations
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling

SHAPE_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}


def best(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each contender's best round."""
    times = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            times[name] = min(times[name], 1000 * (time.perf_counter() - began))
    return times


def prefix_cache(model, tokens: int, rounds: int) -> dict[str, float]:
    """From a prompt to the logits after it, whose first nine tenths are known."""
    known = torch.randint(1, model.config.vocab_size, (tokens,))
    ends = iter(torch.randint(1, model.config.vocab_size, (3 * rounds + 2, tokens // 10)))
    with tempfile.TemporaryDirectory() as folder:
        memory, disk = PrefixCache(model), PrefixCache(model, memory_bytes=0, folder=folder)

        def read(cache):
            prompt = torch.cat([known[: tokens - tokens // 10], next(ends)])
            cache.read(prompt) if cache is not None else State.read(model, prompt)

        read(memory)
        read(disk)
        return best({"plain": lambda: read(None), "memory": lambda: read(memory), "disk": lambda: read(disk)}, rounds)


def forks(model, prefix: int, count: int, length: int, rounds: int) -> dict[str, float]:
    """The log-likelihood of many continuations of one prefix."""
    ids = torch.randint(1, model.config.vocab_size, (prefix,))
    continuations = list(torch.randint(1, model.config.vocab_size, (count, length)))

    def one_by_one():
        for tokens in continuations:
            score_continuations(model, ids, [tokens])

    return best({"one by one": one_by_one, "forked": lambda: score_continuations(model, ids, continuations)}, rounds)


@torch.no_grad()
def verification(model, rounds: int) -> dict[str, float]:
    """A plain step, trials of several tokens, and the ways to have the state after only some of them."""
    cache = model.backbone.new_cache(1)
    step, token = token_step(model, cache), torch.tensor([7])
    other = cache.clone()
    verify = verifier(model, other, 16)
    runs: dict[str, Callable[[], object]] = {"step": lambda: step(token)}
    for count in (1, 2, 5, 9, 16):
        runs[f"trial of {count}"] = lambda count=count: verify(torch.full((1, count), 7))

    def replay():
        verify.commit([3])

    def steps():
        for _ in range(3):
            step(token)

    snapshot = cache.clone()
    runs["keep 3: read them again"] = steps
    runs["keep 3: copy a state"] = lambda: cache.copy_(snapshot, [0], [0])
    times = best(runs, rounds)
    replays = []
    for _ in range(rounds):
        verify(torch.full((1, 5), 7))
        began = time.perf_counter()
        replay()
        replays.append(1000 * (time.perf_counter() - began))
    return times | {"keep 3: replay": min(replays)}


def acceptance(model, tokenizer) -> dict[str, float]:
    """Share of guesses that stay, four at a time, over 4 texts of 80 tokens by the embedded model."""
    small = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype="float32").eval().quantize("int4")
    prompts = (
        "The old man looked at the sea and",
        "It was a dark and stormy night",
        "She opened the letter",
        "He said",
    )
    shares = {}
    for name, drafter in (("int4 weights of itself", DraftModel(small)), ("prompt lookup", PromptLookup())):
        for rule, sampling in (("greedy", Sampling(0)), ("temperature 0.8", Sampling(0.8, seed=1))):
            right = guesses = 0
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
                stream = SpeculativeStream(model, tokenizer, ids, sampling, 80, drafter=drafter)
                for _ in stream:
                    pass
                right, guesses = right + stream.accepted, guesses + stream.proposed
            shares[f"{name}, {rule}"] = right / max(1, guesses)
    return shares


def parts(results: dict[str, dict[str, float]]) -> dict[str, list[dict]]:
    """The rows of the run's record: times as shares of the first contender's, which is the plain way."""
    reuse, verify, guesses = [], {}, {}
    for title, times in results.items():
        first = next(iter(times.values()))
        for name, value in times.items():
            if title == "guesses kept":
                what, rule = name.split(", ")
                guesses.setdefault(what, {"what": what})[rule.replace(" ", "_")] = value
            elif title.startswith("130m shape"):
                verify.setdefault(name, {"what": name})[title.split(", ")[1]] = value / first
            elif value != first:
                reuse.append({"what": f"{title}: {name}", "ratio": value / first})
    return {"reuse": reuse, "verify": list(verify.values()), "guesses": list(guesses.values())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    record.add_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype="float32").eval()
    results = {
        "prefix cache, 2,048 tokens, nine tenths known": prefix_cache(model, 2048, args.rounds),
        "32 continuations of 8 tokens after 1,024": forks(model, 1024, 32, 8, max(2, args.rounds // 3)),
    }
    for dtype in (torch.float32, torch.bfloat16):
        large = mambakit.MambaForCausalLM(mambakit.MambaConfig(**SHAPE_130M)).eval().to(dtype)
        results[f"130m shape, {str(dtype).removeprefix('torch.')}"] = verification(large, args.rounds)
    for title, times in results.items():
        print(title)
        first = next(iter(times.values()))
        for name, ms in times.items():
            print(f"  {name:26s} {ms:10.2f} ms   {ms / first:6.3f} of the first, {first / ms:6.1f} times as fast")
    tokenizer = mambakit.AutoTokenizer.from_pretrained(default_model_path())
    results["guesses kept"] = acceptance(model, tokenizer)
    print("guesses kept")
    for name, share in results["guesses kept"].items():
        print(f"  {name:40s} {share:6.1%}")
    record.write(args.json, parts(results), gpus=0)


if __name__ == "__main__":
    main()
