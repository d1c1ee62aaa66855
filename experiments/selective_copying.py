"""Selective copying: remember tokens scattered among noise (arXiv 2312.00752, table 1 and appendix E.1).

    python -m experiments.selective_copying --out runs/experiments --budget-seconds 180

A row is ``length`` positions, noise but for ``memorize`` tokens at random places, then as many markers; at the i-th
marker the answer is the i-th token. The same two-layer model is trained with selection, and with selection switched off
(`experiments.time_invariant`). The paper trains 400,000 steps at the full length with rate 1e-4; here rows get longer
in stages, and a run ends when it makes no mistakes or its time is over.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.contenders import make_mamba
from experiments.harness import Budget, Results, Step, device_of, half_precision, parameter_count, say, train
from experiments.settings import Settings, option, parse
from experiments.time_invariant import without_selection
from mambakit import MambaForCausalLM
from mambakit.training.optimizer import make_optimizer

NOISE = 0
SELECTIVE, INVARIANT = "selective", "selection off"
_WARMUP = 200  # steps
_PERFECT = 0.999  # accuracy over `check_every` training batches at which the last stage begins to cool down
_COOLING = 0.85  # of a run's time, when the cooldown begins whatever the accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Settings):
    lengths: tuple[int, ...] = option((64, 256, 1024, 4096), "row lengths of the stages; the last is the one evaluated")
    shares: tuple[float, ...] = option(
        (0.4, 0.15, 0.15, 0.3), "of a run's time and steps, what a stage may take at most"
    )
    memorize: int = option(16, "tokens to remember")
    vocabulary: int = option(16, "tokens, noise and marker included")
    models: tuple[str, ...] = option((SELECTIVE, INVARIANT), "which to train")
    hidden_size: int = option(64, "width")
    layers: int = option(2, "Mamba layers")
    batch_size: int = option(64, "rows in a batch, at least")
    batch_tokens: int = option(2**15, "more rows where they are short: this many positions in a batch")
    learning_rate: float = option(3e-3, "constant after a warm-up; it falls to a tenth during the cooldown")
    steps: int = option(60_000, "at most, in a run, before the cooldown")
    cooldown: int = option(1000, "steps of the cooldown, at the last length")
    advance_at: float = option(0.98, "accuracy of a stage's batches at which the next stage starts")
    check_every: int = option(100, "steps between looks at the accuracy")
    evaluation_rows: int = option(1024, "rows of the final evaluation, never trained on")

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.lengths) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares {self.shares} must be one for each of lengths {self.lengths}, and add up to 1")
        if min(self.lengths) < self.memorize:
            raise ValueError(f"{self.memorize} tokens do not fit into {min(self.lengths)} positions; raise lengths")
        for model in self.models:
            if model not in (SELECTIVE, INVARIANT):
                raise ValueError(f"unknown model {model!r}; choose {SELECTIVE!r} or {INVARIANT!r}")


def draw_rows(rows: int, length: int, memorize: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (rows, length + memorize) and answers (rows, memorize): tokens 1 to vocabulary - 2 in order of place."""
    answers = torch.randint(1, vocabulary - 1, (rows, memorize), device=device)
    places = torch.rand(rows, length, device=device).topk(memorize).indices.sort(1).values
    tokens = torch.full((rows, length + memorize), NOISE, device=device)
    tokens[:, length:] = vocabulary - 1
    return tokens.scatter_(1, places, answers), answers


def scores(model: MambaForCausalLM, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss (nats) and accuracy over the marked positions."""
    logits = model(tokens, use_cache=False, logits_to_keep=answers.shape[1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss, (logits.argmax(-1) == answers).float().mean()


class Run:
    """One model, trained through the stages for at most ``seconds`` and then evaluated."""

    def __init__(self, kind: str, seed: int, settings: SelectiveCopying, seconds: float):
        self.kind, self.seed, self.settings = kind, seed, settings
        self.device = device_of(settings)
        torch.manual_seed(seed)
        model = make_mamba(settings.vocabulary, settings.hidden_size, settings.layers, tied=False)
        self.model = (model if kind == SELECTIVE else without_selection(model)).to(self.device)
        self.optimizer = make_optimizer(self.model, settings.learning_rate, (0.9, 0.95), 0.0)
        self.budget = Budget(seconds)
        self.taken = 0
        self.curve: list[dict] = []
        self.stages: list[dict] = []
        torch.manual_seed(seed)  # both kinds see the same rows

    def go(self) -> dict:
        settings, share = self.settings, 0.0
        for part, length in zip(settings.shares, settings.lengths, strict=True):
            last = length == settings.lengths[-1]
            share += part
            step = self._step(length)
            steps = max(1, round(settings.steps * share) - self.taken)
            target, latest = (_PERFECT, _COOLING) if last else (settings.advance_at, _COOLING * share)
            self._stage(step, length, steps, settings.learning_rate, settings.learning_rate, target, latest)
        self._stage(step, length, settings.cooldown, settings.learning_rate, settings.learning_rate / 10, 2.0, 1.0)
        seconds = self.budget.elapsed()
        return {
            "model": self.kind, "seed": self.seed, "parameters": parameter_count(self.model), "steps": self.taken,
            "seconds": seconds, "cut_short": any(stage["ended"] == "budget" for stage in self.stages[-2:]),
            "stages": self.stages, "length": length, "accuracy": self.evaluate(), "curve": self.curve,
        }  # fmt: skip

    def _step(self, length: int) -> Step:
        settings = self.settings
        rows = max(settings.batch_size, settings.batch_tokens // length)

        def draw() -> tuple[Tensor, ...]:
            batch = draw_rows(rows, length, settings.memorize, settings.vocabulary, self.device)
            with half_precision(self.device):
                return scores(self.model, *batch)

        return Step(self.model, self.optimizer, draw, capture=not settings.eager)

    def _stage(
        self, step: Step, length: int, steps: int, rate: float, final: float, target: float, latest: float
    ) -> None:
        """Up to ``steps`` steps, ended by an accuracy of ``target`` or once ``latest`` of the run's time is over."""
        before = self.taken

        def check(taken: int, means: list[float]) -> bool:
            self.curve.append({"step": before + taken, "length": length, "loss": means[0], "accuracy": means[1]})
            return means[1] >= target

        def schedule(progress: float) -> float:
            return (rate + (final - rate) * progress) * min(1.0, (before + progress * steps + 1) / _WARMUP)

        taken, ended = train(
            step, steps, schedule, self.settings.check_every, check,
            lambda: self.budget.elapsed() > latest * self.budget.seconds,
        )  # fmt: skip
        self.taken += taken
        accuracy = self.curve[-1]["accuracy"]
        self.stages.append({"length": length, "steps": taken, "ended": ended, "accuracy": accuracy})
        say(f"  {self.kind}, seed {self.seed}: {self.stages[-1]}, {self.budget.elapsed():.0f} s")

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy in float32 at the last length, on rows from random numbers that training never uses."""
        settings = self.settings
        torch.manual_seed(1_000_003 + self.seed)
        total = 0.0
        for start in range(0, settings.evaluation_rows, settings.batch_size):
            rows = min(settings.batch_size, settings.evaluation_rows - start)
            batch = draw_rows(rows, settings.lengths[-1], settings.memorize, settings.vocabulary, self.device)
            total += scores(self.model, *batch)[1].item() * rows
        return total / settings.evaluation_rows


def main(arguments: list[str] | None = None) -> Results:
    settings = parse(SelectiveCopying, arguments, __doc__ or "")
    results = Results("selective_copying", settings)
    for seed, kind, seconds in results.shares((seed, kind) for seed in settings.seeds for kind in settings.models):
        run = Run(kind, seed, settings, seconds).go()
        results.add(run, run["cut_short"])
        say(f"selective copying, {kind}, seed {seed}: accuracy {run['accuracy']:.4f} after {run['steps']} steps")
    return results.finish()


if __name__ == "__main__":
    main()
