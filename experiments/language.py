"""Language: Mamba against a Transformer++ of equal size, tokens and schedule, on a folder's books.

    python -m experiments.language --data DATA --out runs/experiments --budget-seconds 240

Reads ``books.txt.xz`` and ``books_heldout.txt.xz``, tokenised by the embedded model's 4,096-token BPE. Each contender's
peak learning rate is the best of ``learning_rates`` by validation loss (the last training tokens, left out of training)
after a short run with a seed of its own; both then train on the same windows of the text, seed by seed. Held-out bits
per character are measured along the way, by tokens and by seconds of training alone (evaluations and the capture of the
graph left out).
"""

from __future__ import annotations

import dataclasses
import lzma
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mambakit
from experiments.contenders import MAMBA, TRANSFORMER, Contender, make_contender, next_token_loss
from experiments.harness import (
    TUNING_SEED,
    Budget,
    Results,
    Step,
    choose_rates,
    device_of,
    parameter_count,
    require_file,
    say,
    train,
)
from experiments.settings import Settings, option, parse
from mambakit.training.optimizer import make_optimizer, schedule_factor

_SEPARATOR = "<|endoftext|>\n"
_TOKENIZER = Path(mambakit.__file__).parent / "assets" / "books" / "tokenizer.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language(Settings):
    train_file: str = option("books.txt.xz", "training text in the data folder, documents apart by <|endoftext|>")
    heldout_file: str = option("books_heldout.txt.xz", "held-out text")
    tokenizer: str = option(str(_TOKENIZER), "tokenizer.json")
    tokens_cache: str = option("runs/experiments/books_tokens.npz", "the tokenised text, made where it is not")
    models: tuple[str, ...] = option((MAMBA, TRANSFORMER), "contenders")
    hidden_size: int = option(320, "width of both")
    mamba_layers: int = option(8, "Mamba layers; the Transformer++ has half as many blocks")
    head_size: int = option(64, "of the Transformer++'s attention")
    length: int = option(1024, "tokens of a row")
    batch_size: int = option(16, "rows in a batch")
    learning_rates: tuple[float, ...] = option((1e-3, 2e-3, 4e-3), "peaks to choose from, for each contender")
    tuning_fraction: float = option(0.15, "length of a tuning run, as a fraction of a run's steps")
    steps: int = option(0, "of a run, equal for both; 0: as many as the budget holds, by measured speed")
    largest_steps: int = option(6000, "bound on the steps chosen by the budget")
    warmup: float = option(0.05, "fraction of the steps over which the rate rises; it then falls as a cosine to 1 %%")
    weight_decay: float = option(0.1, "on matrices")
    evaluations: int = option(10, "held-out evaluations in a run")
    validation_tokens: int = option(200_000, "last training tokens kept for choosing the learning rate")

    def __post_init__(self) -> None:
        if not self.steps and not self.budget_seconds:
            raise ValueError("steps is 0 and there is no budget to choose them by; give --steps or --budget-seconds")


@dataclasses.dataclass
class Text:
    """Token streams that begin with, and part documents by, the end-of-text token; and held-out characters."""

    train: Tensor  # (tokens,) int32
    validation: Tensor
    heldout: Tensor
    heldout_characters: int
    vocabulary: int


def tokenized(settings: Language) -> dict[str, np.ndarray]:
    """The token streams as uint16, from the cache file or made and written there."""
    path = Path(settings.tokens_cache)
    if not path.is_file():
        began = time.monotonic()
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(require_file(Path(settings.tokenizer), "the tokenizer")))
        end = tokenizer.token_to_id("<|endoftext|>")
        arrays: dict[str, np.ndarray] = {"vocabulary": np.array(tokenizer.get_vocab_size())}
        for name, file in (("train", settings.train_file), ("heldout", settings.heldout_file)):
            with lzma.open(require_file(Path(settings.data, file), "books"), "rt", encoding="utf-8") as stream:
                documents = stream.read().split(_SEPARATOR)
            parts = [np.array([end], np.uint16)]
            for start in range(0, len(documents), 32):  # in groups: encodings take many times their text's memory
                group = tokenizer.encode_batch_fast(documents[start : start + 32], add_special_tokens=False)
                parts += [np.array([*encoding.ids, end], np.uint16) for encoding in group]
            arrays[name] = np.concatenate(parts)
            arrays[f"{name}_characters"] = np.array(sum(map(len, documents)))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.npz")
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
        say(
            f"tokenised {arrays['train'].size:,} and {arrays['heldout'].size:,} tokens, {time.monotonic() - began:.0f} "
            f"s"
        )
    with np.load(path) as file:
        return dict(file)


def load_text(settings: Language, device: torch.device) -> Text:
    arrays = tokenized(settings)
    train_tokens, heldout = (torch.from_numpy(arrays[k].astype(np.int32)).to(device) for k in ("train", "heldout"))
    kept = train_tokens.numel() - settings.validation_tokens
    if kept <= settings.length:
        raise ValueError(
            f"{train_tokens.numel()} training tokens leave {kept} beside {settings.validation_tokens} for validation, "
            f"less than a row of {settings.length}; lower --validation-tokens or --length"
        )
    return Text(
        train_tokens[:kept], train_tokens[kept:], heldout, int(arrays["heldout_characters"]), int(arrays["vocabulary"])
    )


@torch.no_grad()
def total_nats(model: Contender, tokens: Tensor, length: int, rows: int) -> float:
    """Summed loss of every token but the first, in rows of ``length`` that each begin from nothing, ``rows`` at a
    time."""
    model.eval()
    tokens = tokens.long()
    whole = (tokens.numel() - 1) // length * length
    inputs, targets = (tokens[i : i + whole].view(-1, length) for i in (0, 1))
    batches = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    if whole < tokens.numel() - 1:
        batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    losses = [next_token_loss(model, x, y) * y.numel() for x, y in batches if y.numel()]
    model.train()
    return float(torch.stack(losses).double().sum())


class Run:
    """One contender with one seed and one learning rate."""

    def __init__(self, kind: str, seed: int, rate: float, text: Text, settings: Language):
        self.kind, self.seed, self.rate, self.text, self.settings = kind, seed, rate, text, settings
        device = text.train.device
        torch.manual_seed(seed)
        self.model = make_contender(
            kind, -(-text.vocabulary // 8) * 8, settings.hidden_size, settings.mamba_layers, settings.head_size,
            settings.length,
        ).to(device)  # fmt: skip
        self.optimizer = make_optimizer(self.model, rate, (0.9, 0.95), settings.weight_decay)
        self.step = Step(self.model, self.optimizer, self.draw, capture=not settings.eager)
        self.offsets = torch.arange(settings.length + 1, device=device)
        torch.manual_seed(seed)  # both contenders see the same windows

    def draw(self) -> tuple[Tensor, ...]:
        settings, tokens = self.settings, self.text.train
        last = tokens.numel() - settings.length - 1
        starts = torch.randint(0, last + 1, (settings.batch_size, 1), device=tokens.device)
        rows = tokens[starts + self.offsets].long()
        return (next_token_loss(self.model, rows[:, :-1], rows[:, 1:]),)

    def go(self, steps: int, deadline: float, evaluations: int) -> dict:
        """Train ``steps`` steps within ``deadline`` seconds, with as many ``evaluations`` of the held-out text."""
        settings = self.settings
        every = max(1, steps // max(1, evaluations))
        budget, evaluating = Budget(deadline), 0.0
        curve: list[dict] = []

        def check(taken: int, means: list[float]) -> bool:
            nonlocal evaluating
            now = budget.elapsed()
            point = {
                "step": taken, "tokens": taken * settings.batch_size * settings.length,
                "seconds": now - evaluating - self.step.preparing, "loss": means[0],
            }  # fmt: skip
            if evaluations:
                point["heldout_bits_per_character"] = self.heldout_bits()
            curve.append(point)
            evaluating += budget.elapsed() - now
            return False

        def schedule(progress: float) -> float:
            return self.rate * schedule_factor(progress, "cosine", settings.warmup, 0.01)

        taken, ended = train(self.step, steps, schedule, every, check, lambda: budget.left() < 0)
        return {
            "model": self.kind, "seed": self.seed, "parameters": parameter_count(self.model),
            "learning_rate": self.rate, "steps": taken, "planned_steps": steps, "ended": ended, "curve": curve,
        }  # fmt: skip

    def heldout_bits(self) -> float:
        nats = total_nats(self.model, self.text.heldout, self.settings.length, 2 * self.settings.batch_size)
        return nats / math.log(2) / self.text.heldout_characters

    def validation_loss(self) -> float:
        tokens = self.text.validation
        nats = total_nats(self.model, tokens, self.settings.length, 2 * self.settings.batch_size)
        return nats / (tokens.numel() - 1)


def choose_steps(text: Text, settings: Language, budget: Budget) -> tuple[int, dict[str, float]]:
    """As many steps as fit, tuning included, and the seconds that a step of each contender takes."""
    seconds = {kind: Run(kind, TUNING_SEED, 1e-4, text, settings).step.seconds_per_step(20) for kind in settings.models}
    if settings.steps:
        return settings.steps, seconds
    tuning = len(settings.learning_rates) * settings.tuning_fraction if len(settings.learning_rates) > 1 else 0.0
    # 15 % for evaluations, and for capturing each run's graph.
    steps = int(0.85 * budget.left() / (sum(seconds.values()) * (len(settings.seeds) + tuning)))
    return max(1, min(steps, settings.largest_steps)), seconds


def main(arguments: list[str] | None = None) -> Results:
    settings = parse(Language, arguments, __doc__ or "")
    results = Results("language", settings)
    text = load_text(settings, device_of(settings))
    steps, seconds = choose_steps(text, settings, results.budget)
    say(f"language: {steps} steps a run, seconds a step: {seconds}")

    def trial(kind: str, rate: float) -> float:
        run = Run(kind, TUNING_SEED, rate, text, settings)
        run.go(max(1, int(steps * settings.tuning_fraction)), 0.0, 0)
        return run.validation_loss()

    rates, trials = choose_rates(settings.models, settings.learning_rates, trial)
    results.note(planned_steps=steps, seconds_per_step=seconds, tuning=trials, learning_rates=rates)
    for seed, kind, _ in results.shares((seed, kind) for seed in settings.seeds for kind in settings.models):
        # Equal steps for all: a run may take all that is left, so that only the last ones can be cut short.
        seconds_left = 0.97 * results.budget.left() if settings.budget_seconds else 0.0
        run = Run(kind, seed, rates[kind], text, settings).go(steps, seconds_left, settings.evaluations)
        results.add(run, run["ended"] == "budget")
        say(f"language, {kind}, seed {seed}: {run['curve'][-1]}")
    return results.finish()


if __name__ == "__main__":
    main()
