"""Speculative decoding with a controlled acceptance rate: an engine of 1 to 8 slots with drafts, beside the same engine
without.

    python benchmarks/drafts.py --json out.json                       # 1.4b by 130m, on one NVIDIA GPU
    python benchmarks/drafts.py --rows 1 8 --phases                   # and what the parts of a round take
    python benchmarks/drafts.py --device cpu --target tiny --draft tiny --new 24  # a look at the script itself

Random weights and tokens, greedy. A coin decides which guesses are accepted, right with probability --acceptance each:
drafts and verifications do their work, and what they say is replaced. Drafters:

    model    the draft model of --draft, all slots together
    packed   the same with int4 weights
    free     guesses that cost nothing, as prompt lookup's: what a verification alone allows

Figures are tokens a second of all slots, from two lengths of text, so that prompts and captures are not counted; the
median of --rounds. `expected` is what independent guesses of that acceptance give: (1 - a^(k + 1)) / (1 - a) tokens a
round. Every text has k guesses in each round; --adaptive lets their number follow the acceptance, as it does for users.

Columns, milliseconds a round: `ms` from one to the next, `host` what Python and PyTorch do without waiting for the
device, `gpu` between the beginning and the end of a round's graph (rounds on the device alone). With --phases: a step
of the draft model, a verification of k + 1 tokens of each row, and a commit, each in a loop of its own.
"""

from __future__ import annotations

import argparse
import random
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
from mambakit.decoding import loop, round_graphs, speculation, transfers
from mambakit.decoding.device_acceptance import accepted_of
from mambakit.decoding.draft_model import DraftModel
from mambakit.decoding.draft_slots import DraftSlots
from mambakit.decoding.drafting import Draft
from mambakit.decoding.guess_count import GuessCount, Guesses
from mambakit.decoding.round_steps import steps_for
from mambakit.generation.engine import Engine, Request


class Coin:
    """Decides which guesses are accepted, in place of what the verification says: its work is done all the same.

    The texts are not the model's then, and the acceptance does not depend on where random weights have ties.

    Args:
        acceptance: the probability that a guess is right, where all before it were.
        device: where the models are.
    """

    def __init__(self, acceptance: float, device: str):
        self.acceptance, self._chance, self._steps = acceptance, random.Random(0), steps_for(torch.device(device))
        self._choose, self._accept = loop.choose_together, self._steps.accept

    def __enter__(self) -> None:
        loop.choose_together, self._steps.accept = self._replaced, self._replaced_on_device

    def __exit__(self, *_: object) -> None:
        loop.choose_together, self._steps.accept = self._choose, self._accept

    def _replaced(self, acceptances: Any, logits: torch.Tensor, drafts: Any) -> list[list[int]]:
        found = self._choose(acceptances, logits, drafts)
        for i, (one, draft) in enumerate(zip(acceptances, drafts, strict=True)):
            count = 0
            while count < len(draft.tokens) and self._chance.random() < self.acceptance:
                count += 1
            one.text.position += count + 1 - len(found[i])
            found[i] = [*draft.tokens[:count], max(0, found[i][-1])]
        return found

    def _replaced_on_device(
        self, guesses: torch.Tensor, best: torch.Tensor, counts: torch.Tensor, accepted: torch.Tensor
    ) -> None:
        self._accept(guesses, best, counts, accepted)
        k = guesses.shape[1] - 1
        places = torch.arange(k, device=guesses.device)
        right = torch.rand(guesses[:, 1:].shape, device=guesses.device) < self.acceptance
        accepted.copy_(accepted_of(right & (places < counts[:, None])))
        kept = places < accepted[:, None]
        best[:, :k] = torch.where(kept, guesses[:, 1:], best[:, :k])


class Always(GuessCount):
    """As many guesses in every round."""

    def next(self) -> Guesses:
        return Guesses(self._most, max(2, self._most))


class Clock:
    """The host's time and the device's in an engine's rounds, while it is entered."""

    def __init__(self, cuda: bool):
        self._cuda, self.waited = cuda, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Clock:
        self._wait, self._launch = transfers.Arrival.wait, round_graphs.RoundGraphs.launch
        clock, wait, launch = self, self._wait, self._launch

        def waiting(arrival: Any) -> None:
            began = time.perf_counter()
            wait(arrival)
            clock.waited += time.perf_counter() - began

        def launching(graphs: Any, *arguments: Any) -> None:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * clock._cuda)]
            for event in events[:1]:
                event.record()
            launch(graphs, *arguments)
            for event in events[1:]:
                event.record()
                clock._events.append((events[0], event))

        transfers.Arrival.wait, round_graphs.RoundGraphs.launch = waiting, launching
        return self

    def __exit__(self, *_: object) -> None:
        transfers.Arrival.wait, round_graphs.RoundGraphs.launch = self._wait, self._launch

    def device_seconds(self) -> float | None:
        """The median of the rounds; None where none was on the device."""
        if not self._events:
            return None
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in self._events) / 1e3


class FreeGuesses:
    """A `Drafter` whose guesses cost nothing."""

    def begin(self, ids: torch.Tensor, sampling: Any, scores: Any, generator: Any) -> None:
        pass

    def propose(self, text: list[int], most: int) -> Draft:
        return Draft([(text[-1] + i) % VOCABULARY for i in range(most)])


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
    if engine.drafts is not None:
        engine.drafts.prepare()
    times: dict[int, list[float]] = {short: [], new: []}
    counted = {}
    for _ in range(rounds):
        for length, found in times.items():
            before = 0 if engine.drafts is None else engine.drafts.rounds
            found.append(seconds_of(lambda n=length: engine.write(requests_of(prompts, n)), cuda))
            counted[length] = length if engine.drafts is None else engine.drafts.rounds - before
    seconds = statistics.median(times[new]) - statistics.median(times[short])
    return len(prompts) * (new - short) / seconds, seconds / (counted[new] - counted[short])


def round_times(engine: Engine, prompts: list[torch.Tensor], new: int, cuda: bool) -> dict[str, float | None]:
    """Seconds of the host and of the device in a round, prompts not counted. The host's part of a round that it sees
    itself contains its waiting, which is no copy's."""
    found = []
    for length in (max(2, new // 4), new):
        before = engine.drafts.rounds
        with Clock(cuda) as clock:
            seconds = seconds_of(lambda n=length: engine.write(requests_of(prompts, n)), cuda)
        found.append((engine.drafts.rounds - before, seconds - clock.waited, clock.device_seconds()))
    (few, short, _), (many, long, device) = found
    return {"host": (long - short) / max(1, many - few), "gpu": device}


def phases(engine: Engine, k: int, cuda: bool) -> dict[str, float]:
    """Seconds of the parts of a round, each in a loop of its own. The engine must not be used afterwards."""
    pool, drafter = engine._pool, engine.drafts.speculation._drafter

    def timed(run: Callable[[], object], times: int = 30) -> float:
        run()
        return seconds_of(lambda: [run() for _ in range(times)], cuda) / times

    tokens = torch.zeros(pool.size, k + 1, dtype=torch.int64, device=pool.model.device)

    def verify_and_commit() -> None:
        pool.verify(tokens, k + 1)
        pool.commit([1] * pool.size)

    with torch.no_grad():
        found = {"verify": timed(lambda: pool.verify(tokens, k + 1))}
        found["commit"] = timed(verify_and_commit) - found["verify"]
        if isinstance(drafter, DraftSlots):
            found["draft step"] = timed(lambda: drafter.pool.step(tokens[:, 0]))
    return found


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
    parser.add_argument("--adaptive", action="store_true", help="the number of guesses follows the acceptance")
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
        f"{'ms':>7} {'host':>7} {'gpu':>7}"
    )
    if not options.adaptive:
        speculation.GuessCount = Always
    found = []
    for rows in options.rows:
        prompts = list(torch.randint(0, VOCABULARY, (rows, options.prompt), generator=torch.Generator().manual_seed(1)))
        plain = Engine(model, rows)
        base, step = rate(plain, prompts, options.new, options.rounds, cuda)
        found.append({"rows": rows, "drafter": "none", "tokens_per_second": base, "round": step})
        print(f"{rows:>4} {'none':>8} {'':>6} {'':>2} {base:10,.0f} {'':>14} {'':>8} {step * 1e3:7.3f}", flush=True)
        for name in options.drafters:
            for acceptance in options.acceptance:
                for k in options.draft_tokens:
                    drafter = FreeGuesses() if name == "free" else DraftModel(small[name])
                    engine = Engine(model, rows, drafter=drafter, draft_tokens=k)
                    with Coin(acceptance, options.device):
                        speed, seconds = rate(engine, prompts, options.new, options.rounds, cuda)
                        times = round_times(engine, prompts, options.new, cuda)
                    drafts = engine.drafts
                    kept = drafts.accepted / max(1, drafts.proposed)
                    row = {
                        "rows": rows, "drafter": name, "acceptance": acceptance, "draft_tokens": k,
                        "tokens_per_second": speed, "speedup": speed / base, "round": seconds, "kept": kept,
                        "expected": (1 - acceptance ** (k + 1)) / (1 - acceptance) if acceptance < 1 else k + 1,
                        **times,
                    }  # fmt: skip
                    if options.phases:
                        row["phases"] = phases(engine, k, cuda)
                    found.append(row)
                    records.write(options.json, {"drafts": found}, gpus=int(cuda))
                    print(
                        f"{rows:>4} {name:>8} {acceptance:6.2f} {k:>2} {speed:10,.0f} {speed / base:13.2f}x "
                        f"{speed * seconds / rows:8.2f} {seconds * 1e3:7.3f} {times['host'] * 1e3:7.3f} "
                        + ("" if times["gpu"] is None else f"{times['gpu'] * 1e3:7.3f}"),
                        flush=True,
                    )
                    if options.phases:
                        print("     " + ", ".join(f"{n} {1e3 * s:.3f}" for n, s in row["phases"].items()))
                    del engine
                    released()


if __name__ == "__main__":
    main()
