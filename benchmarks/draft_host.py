"""The host's work in a round of speculation, without a GPU: what Python and PyTorch do besides the captured kernels.

    python benchmarks/draft_host.py --json out.json

Decoders and verifiers have the control flow of a GPU's, but a replay of a graph runs the captured function again, on
the CPU, with the clock and the counters stopped. What is left is what a GPU would wait for, or what it would hide.
Columns, a round: torch ops that the host dispatches, device-to-host syncs (`tolist`, `item`, `wait`), host
microseconds (the median of rounds in a steady state, all slots writing), and tokens of all slots.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record as records
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.decoding import loop, registry
from mambakit.decoding import verify_layers as layers
from mambakit.decoding.draft_model import DraftModel
from mambakit.decoding.drafting import Draft
from mambakit.decoding.graph_step import GraphDecoder
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.engine import Engine, Request

VOCABULARY = 499


class Meter(TorchDispatchMode):
    """Counts ops and syncs, and measures time, except while a replay runs."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.ops = self.syncs = 0
        self.away = 0.0  # seconds in replays

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += not self.paused
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        if self.paused:
            yield
            return
        self.paused, began = True, time.perf_counter()
        try:
            yield
        finally:
            self.paused = False
            self.away += time.perf_counter() - began


METER = Meter()


def counted(owner: Any, name: str) -> None:
    """Have a method count as a sync."""
    inner = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        METER.syncs += not METER.paused
        return inner(*arguments)

    setattr(owner, name, call)


class Replayed:
    """A captured graph: each replay runs the function again."""

    def __init__(self, run: Any, device: Any, **_: Any):
        self._run = run
        with METER.replay():
            self.result = run()

    def replay(self) -> None:
        with METER.replay(), torch.no_grad():
            again = self._run()
            if again is not None:
                self.result.copy_(again)


class Decoder(GraphDecoder):
    """A decoder in a graph."""

    def __init__(self, model: Any, states: Any, run: Any = None, capacity: int = 64):
        self.model, self.states, self.rows, self.capacity = model, states, states.max_batch_size, capacity
        self.holder, self.verifiers = None, {}
        self.tokens = torch.zeros(self.rows, dtype=torch.int64)
        self.history = torch.zeros(self.rows, capacity, dtype=torch.int64)
        self.position = torch.zeros(1, dtype=torch.int64)
        self.logits = torch.zeros(self.rows, model.config.vocab_size)

    def launch(self, model: Any = None) -> None:
        hidden = self.model.backbone(self.tokens[:, None], cache_params=self.states).last_hidden_state
        self.logits.copy_(self.model.lm_head(hidden)[:, -1])
        self.tokens.copy_(self.logits.argmax(-1))

    def __call__(self) -> None:
        with METER.replay():
            self.launch()


class Free:
    """A `Drafter` that repeats the last token."""

    def begin(self, ids: Any, sampling: Any, scores: Any, generator: Any) -> None:
        pass

    def propose(self, text: list[int], most: int) -> Draft:
        return Draft([text[-1]] * most)


def emulate() -> None:
    kind = registry.DecoderKind("a graph", lambda *_, **__: None, Decoder, captured=True)
    registry.DECODERS = (kind, registry.FORWARD)
    registry.why_not_captured = lambda *_, **__: None
    layers.CapturedGraph = Replayed
    with contextlib.suppress(ImportError):
        from mambakit.decoding import draft_rounds

        draft_rounds.CapturedGraph = Replayed
    captured = registry.VerifierKind("a graph", lambda *_, **__: None, layers.CapturedVerifier)
    registry.VERIFIERS = (captured,)
    for owner, name in ((torch.Tensor, "tolist"), (torch.Tensor, "item"), (torch.Tensor, "__bool__"),
                        (loop.HostCopy, "wait")):  # fmt: skip
        counted(owner, name)


def measure(model: Any, drafter: Any, slots: int, k: int, sampling: SamplingParams, steps: int) -> dict[str, float]:
    """A round's ops, syncs, seconds and tokens: medians."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"ops": [], "syncs": [], "seconds": [], "tokens": []}
    for counts in (False, True):
        options = {} if drafter is None else {"drafter": drafter, "draft_tokens": k}
        engine = Engine(model, slots, **options)
        for i in range(slots):
            ids = torch.randint(0, VOCABULARY, (5,), generator=generator)
            own = SamplingParams(sampling.temperature, seed=i)
            engine.submit(Request(ids, own, max_new_tokens=100_000))
        for _ in range(slots + 6):
            engine.step()
        with METER if counts else contextlib.nullcontext():
            for _ in range(steps):
                METER.ops = METER.syncs = 0
                METER.away, began = 0.0, time.perf_counter()
                tokens = len(engine.step())
                seconds = time.perf_counter() - began - METER.away
                if counts:
                    found["ops"].append(METER.ops)
                    found["syncs"].append(METER.syncs)
                else:
                    found["seconds"].append(seconds)
                    found["tokens"].append(tokens)
    return {name: statistics.median(values) for name, values in found.items()} | {
        "tokens": statistics.mean(found["tokens"])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[3])
    parser.add_argument("--steps", type=int, default=60)
    records.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    emulate()
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = MambaForCausalLM(MambaConfig(**shape)).eval()
    model.generation_config.eos_token_id = None
    found = []
    print(f"{'rows':>4} {'drafter':>8} {'texts':>8} {'k':>2} {'ops':>6} {'syncs':>6} {'us':>8} {'tokens':>7}")
    for rows in options.rows:
        for k in options.draft_tokens:
            for name, drafter in (("none", None), ("model", DraftModel(model)), ("free", Free())):
                for texts, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                    one = measure(model, drafter, rows, k, SamplingParams(temperature), options.steps)
                    found.append({"rows": rows, "drafter": name, "texts": texts, "draft_tokens": k, **one})
                    print(
                        f"{rows:>4} {name:>8} {texts:>8} {k:>2} {one['ops']:6.0f} {one['syncs']:6.0f} "
                        f"{one['seconds'] * 1e6:8.0f} {one['tokens']:7.2f}",
                        flush=True,
                    )
    records.write(options.json, {"draft_host": found}, gpus=0)


if __name__ == "__main__":
    main()
