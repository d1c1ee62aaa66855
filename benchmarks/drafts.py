"""Speculative decoding with a controlled acceptance rate: an engine of 1 to 8 slots with drafts, beside the same engine
without.

    python benchmarks/drafts.py --json out.json                       # 1.4b by 130m, on one NVIDIA GPU
    python benchmarks/drafts.py --drafters free --rows 1 --phases     # what the parts of a round take
    python benchmarks/drafts.py --device cpu --target tiny --draft tiny --new 24  # a look at the script itself

Random weights and tokens, greedy. Every guess is right with probability --acceptance, whatever the draft model says:
its work is done, and its guesses are replaced. Drafters:

    model    the draft model of --draft, all slots together
    packed   the same with int4 weights
    free     guesses that cost nothing, as prompt lookup's: what a verification alone allows

Figures are tokens a second of all slots, from two lengths of text, so that prompts and captures are not counted; the
median of --rounds. `expected` is what independent guesses of that acceptance give: (1 - a^(k + 1)) / (1 - a) tokens a
round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record as records
from benchmarks.generation import SHAPES, VOCABULARY, check, mamba, released
from mambakit.decoding.draft_model import DraftModel, DraftSlots
from mambakit.decoding.drafting import Draft
from mambakit.generation.engine import Engine, Request


class Oracle:
    """Right and wrong guesses: the texts are known, and each guess is right with a given probability.

    Args:
        texts: of each prompt its tokens and what plain decoding writes.
        acceptance: the probability.
    """

    def __init__(self, texts: dict[tuple[int, ...], list[int]], acceptance: float):
        self.texts, self.acceptance = texts, acceptance
        self._chance = torch.Generator().manual_seed(0)

    def guesses(self, prompt: tuple[int, ...], at: int, count: int) -> list[int]:
        """The guesses of tokens ``at`` onwards of the text of this prompt."""
        truth = self.texts[prompt][at : at + count]
        right = (torch.rand(count, generator=self._chance) < self.acceptance).tolist()
        return [token if good else (token + 1) % VOCABULARY for token, good in zip(truth, right, strict=False)]


class FreeGuesses:
    """A `Drafter` whose guesses cost nothing."""

    def __init__(self, oracle: Oracle):
        self._oracle = oracle

    def begin(self, ids: torch.Tensor, sampling: Any, scores: Any, generator: Any) -> None:
        self._prompt = tuple(ids.tolist())

    def propose(self, text: list[int], most: int) -> Draft:
        return Draft(self._oracle.guesses(self._prompt, len(text), most))


class ReplacedGuesses(DraftModel):
    """A draft model whose work is done, and whose guesses are the oracle's."""

    def __init__(self, model: Any, oracle: Oracle):
        super().__init__(model)
        self._oracle = oracle

    def for_slots(self, slots: int) -> DraftSlots:
        return _ReplacingSlots(self.model, slots, self._oracle)


class _ReplacingSlots(DraftSlots):
    def __init__(self, model: Any, slots: int, oracle: Oracle):
        super().__init__(model, slots)
        self._oracle, self._prompts, self._lengths = oracle, {}, [0] * slots

    def begin(self, slot: int, ids: torch.Tensor, sampling: Any) -> None:
        super().begin(slot, ids, sampling)
        self._prompts[slot] = tuple(ids.tolist())

    def propose(self, texts: Any, most: Any) -> list[Draft]:
        self._lengths = [0 if text is None else len(text) for text in texts]
        return super().propose(texts, most)

    def guesses(self, found: list[list[int]]) -> list[list[int]]:
        return [
            self._oracle.guesses(self._prompts[slot], length, len(row)) if length else row
            for slot, (row, length) in enumerate(zip(found, self._lengths, strict=True))
        ]


def requests_of(prompts: list[torch.Tensor], new: int) -> list[Request]:
    return [Request(prompt, max_new_tokens=new) for prompt in prompts]


def seconds_of(run: Callable[[], object], cuda: bool) -> float:
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rate(engine: Engine, prompts: list[torch.Tensor], new: int, rounds: int, cuda: bool) -> tuple[float, float]:
    """(tokens a second of all texts, seconds a round of all texts), prompts not counted."""
    short = max(2, new // 4)
    engine.write(requests_of(prompts, short))  # kernels are compiled, graphs captured
    times: dict[int, list[float]] = {short: [], new: []}
    counted = {}
    for _ in range(rounds):
        for length, found in times.items():
            before = 0 if engine.drafts is None else engine.drafts.rounds
            found.append(seconds_of(lambda n=length: engine.write(requests_of(prompts, n)), cuda))
            counted[length] = length if engine.drafts is None else engine.drafts.rounds - before
    seconds = statistics.median(times[new]) - statistics.median(times[short])
    return len(prompts) * (new - short) / seconds, seconds / (counted[new] - counted[short])


def phases(engine: Engine, prompts: list[torch.Tensor], new: int, cuda: bool) -> dict[str, float]:
    """Seconds a round of proposing, verifying and keeping, each waited for: their sum is more than a round."""
    spent: dict[str, float] = {}
    assert engine.drafts is not None

    def timed(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            result = inner(*arguments)
            if cuda:
                torch.cuda.synchronize()
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - began
            return result

        setattr(owner, name, call)

    for owner, name, label in (
        (engine.drafts._drafter, "propose", "propose"), (engine._pool, "verify", "verify"),
        (engine._pool, "commit", "commit"), (engine._loop, "verify", "verify and choose"),
    ):  # fmt: skip
        timed(owner, name, label)
    before = engine.drafts.rounds
    engine.write(requests_of(prompts, new))
    return {label: seconds / (engine.drafts.rounds - before) for label, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--target", choices=SHAPES, default="1.4b")
    parser.add_argument("--draft", choices=SHAPES, default="130m")
    parser.add_argument(
        "--drafters", nargs="+", choices=("model", "packed", "free"), default=["model", "packed", "free"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.7])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phases", action="store_true", help="also the time of each part of a round")
    records.add_argument(parser)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(
            "there is no NVIDIA GPU here; --device cpu --target tiny --draft tiny tries the script without one"
        )
    check(options.device)
    model = mamba(options.target, options.device)
    small = {"model": mamba(options.draft, options.device), "packed": None}
    if "packed" in options.drafters:
        small["packed"] = mamba(options.draft, options.device).quantize("int4")
    print(f"{options.target} by {options.draft}, {options.prompt} + {options.new} tokens")
    print(
        f"{'rows':>4} {'drafter':>8} {'right':>6} {'k':>2} {'tokens/s':>10} {'against plain':>14} {'a round':>8} "
        f"{'ms':>7}"
    )
    found = []
    for rows in options.rows:
        prompts = list(torch.randint(0, VOCABULARY, (rows, options.prompt), generator=torch.Generator().manual_seed(1)))
        plain = Engine(model, rows)
        base, step = rate(plain, prompts, options.new, options.rounds, cuda)
        written = plain.write(requests_of(prompts, options.new + 16))
        texts = {tuple(r.prompt_ids.tolist()): r.prompt_ids.tolist() + r.tokens for r in written}
        found.append({"rows": rows, "drafter": "none", "tokens_per_second": base, "round": step})
        print(f"{rows:>4} {'none':>8} {'':>6} {'':>2} {base:10,.0f} {'':>14} {'':>8} {step * 1e3:7.3f}", flush=True)
        for name in options.drafters:
            for acceptance in options.acceptance:
                for k in options.draft_tokens:
                    oracle = Oracle(texts, acceptance)
                    drafter = FreeGuesses(oracle) if name == "free" else ReplacedGuesses(small[name], oracle)
                    engine = Engine(model, rows, drafter=drafter, draft_tokens=k)
                    speed, seconds = rate(engine, prompts, options.new, options.rounds, cuda)
                    drafts = engine.drafts
                    kept = drafts.accepted / max(1, drafts.proposed)
                    row = {
                        "rows": rows, "drafter": name, "acceptance": acceptance, "draft_tokens": k,
                        "tokens_per_second": speed, "speedup": speed / base, "round": seconds, "kept": kept,
                        "expected": (1 - acceptance ** (k + 1)) / (1 - acceptance) if acceptance < 1 else k + 1,
                    }  # fmt: skip
                    if options.phases:
                        row["phases"] = phases(engine, prompts, options.new, cuda)
                    found.append(row)
                    print(
                        f"{rows:>4} {name:>8} {acceptance:6.2f} {k:>2} {speed:10,.0f} {speed / base:13.2f}x "
                        f"{speed * seconds / rows:8.2f} {seconds * 1e3:7.3f}",
                        flush=True,
                    )
                    if options.phases:
                        print("     " + ", ".join(f"{n} {1e3 * s:.3f}" for n, s in row["phases"].items()))
                    del engine
                    released()
    records.write(options.json, {"drafts": found}, gpus=int(cuda))


if __name__ == "__main__":
    main()
