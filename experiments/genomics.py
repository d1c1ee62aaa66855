"""Genomics: trained on one bacterium, read on another, by length of context.

    python -m experiments.genomics --data DATA --out runs/experiments --budget-seconds 150

Trained on Klebsiella pneumoniae MGH 78578 (``dna/klebsiella_mgh78578.fna.xz``), either strand with probability 1/2,
rows longer in stages at a constant number of tokens a step. Evaluated on E. coli 536 (``dna/ecoli_536.fna.gz``),
another genus of the family: per-nucleotide perplexity of the same nucleotides cut into rows of 2^10 to 2^17, each read
from an empty state. The Transformer++ of equal size trains on rows up to ``transformer_length``, its longest context.
A genome is small enough to be learned by heart, so each contender's learning rate and its number of steps are chosen on
the last part of the training genome, which no run trains on. The Markov model counts both strands of the training
genome; its order and smoothing are chosen on that part, too.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.contenders import (
    MAMBA,
    TRANSFORMER,
    Contender,
    head_weight,
    hidden_states,
    make_contender,
    next_token_loss,
)
from experiments.harness import (
    TUNING_SEED,
    Budget,
    Results,
    Step,
    choose_rates,
    device_of,
    half_precision,
    parameter_count,
    require_file,
    say,
    train,
)
from experiments.markov import MarkovModel
from experiments.settings import Settings, option, parse
from mambakit.training.optimizer import make_optimizer, schedule_factor

LETTERS = "ACGT"  # tokens 0 to 3; the complement of token t is 3 - t
START = 4
_VOCABULARY = 8
_TRAIN, _HELDOUT = "dna/klebsiella_mgh78578.fna.xz", "dna/ecoli_536.fna.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Genomics(Settings):
    models: tuple[str, ...] = option((MAMBA, TRANSFORMER), "contenders")
    hidden_size: int = option(128, "width of both")
    mamba_layers: int = option(12, "Mamba layers; the Transformer++ has half as many blocks")
    head_size: int = option(32, "of the Transformer++'s attention")
    lengths: tuple[int, ...] = option((1024, 4096, 16384, 131072), "row lengths of the stages")
    shares: tuple[float, ...] = option((0.5, 0.2, 0.15, 0.15), "of the steps, for each stage")
    transformer_length: int = option(8192, "longest row and context of the Transformer++")
    batch_tokens: int = option(2**16, "tokens of a batch; one row where rows are longer")
    learning_rates: tuple[float, ...] = option((1e-3, 2e-3, 4e-3, 8e-3), "peaks to choose from, for each contender")
    steps: tuple[int, ...] = option(
        (500, 1000, 2000, 4000), "to choose from; the rate is chosen with the first of them"
    )
    weight_decay: float = option(0.1, "on matrices")
    contexts: tuple[int, ...] = option(tuple(2**k for k in range(10, 18)), "contexts of the evaluation")
    evaluation_tokens: int = option(2**22, "nucleotides of the held-out genome to score; each context divides it")
    validation_tokens: int = option(
        200_000, "last nucleotides of the training genome, kept for choosing rates and the order"
    )
    markov_order: int = option(11, "longest order")
    markov_weights: tuple[float, ...] = option((1.0, 4.0, 16.0, 64.0), "smoothing weights to choose from")

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.lengths) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares {self.shares} must be one for each of lengths {self.lengths}, and add up to 1")
        for context in self.contexts:
            if self.evaluation_tokens % context:
                raise ValueError(f"context {context} does not divide evaluation_tokens {self.evaluation_tokens}")


def read_fasta(path: Path) -> Tensor:
    """Every record's letters, joined, as tokens (length,) int64.

    Raises:
        ValueError: a letter other than A, C, G, T.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(require_file(path, "a genome"), "rt", encoding="ascii") as file:  # type: ignore[operator]
        text = "".join(line.strip() for line in file if not line.startswith(">")).upper()
    table = np.full(256, 255, np.uint8)
    table[list(LETTERS.encode())] = range(4)
    tokens = table[np.frombuffer(text.encode("ascii"), np.uint8)]
    if (tokens == 255).any():
        wrong = text[int((tokens == 255).argmax())]
        raise ValueError(f"{path} has the letter {wrong!r}; these experiments read A, C, G, T alone")
    return torch.from_numpy(tokens.astype(np.int64))


def draw_rows(genome: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, length): windows of either strand; the inputs are the targets behind a START."""
    starts = torch.randint(0, genome.numel() - length + 1, (rows, 1), device=genome.device)
    windows = genome[starts + torch.arange(length, device=genome.device)]
    other_strand = torch.rand(rows, 1, device=genome.device) < 0.5
    targets = torch.where(other_strand, 3 - windows.flip(1), windows)
    return after_start(targets), targets


def after_start(targets: Tensor) -> Tensor:
    return torch.cat([torch.full_like(targets[:, :1], START), targets[:, :-1]], 1)


@torch.no_grad()
def nats_by_position(model: Contender, genome: Tensor, context: int, tokens: int, at_once: int = 2**19) -> Tensor:
    """Mean loss (context,) float64 at each position of rows of ``context`` over the genome's first ``tokens``."""
    model.eval()
    targets = genome[:tokens].view(-1, context)
    total = torch.zeros(context, dtype=torch.float64, device=genome.device)
    for part in targets.split(max(1, at_once // context)):
        with half_precision(genome.device):
            logits = hidden_states(model, after_start(part)) @ head_weight(model).T
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), part.flatten(), reduction="none")
        total += losses.view_as(part).double().sum(0)
    model.train()
    return total / targets.shape[0]


class Run:
    """One contender with one seed and one learning rate."""

    def __init__(self, kind: str, seed: int, rate: float, genome: Tensor, settings: Genomics):
        self.kind, self.seed, self.rate, self.genome, self.settings = kind, seed, rate, genome, settings
        self.longest = min(max(settings.lengths), settings.transformer_length) if kind == TRANSFORMER else 2**62
        torch.manual_seed(seed)
        self.model = make_contender(
            kind, _VOCABULARY, settings.hidden_size, settings.mamba_layers, settings.head_size,
            settings.transformer_length,
        ).to(genome.device)  # fmt: skip
        self.optimizer = make_optimizer(self.model, self.rate, (0.9, 0.95), settings.weight_decay)
        torch.manual_seed(seed)

    def step_at(self, length: int) -> Step:
        rows = max(1, self.settings.batch_tokens // length)

        def draw() -> tuple[Tensor, ...]:
            return (next_token_loss(self.model, *draw_rows(self.genome, rows, length)),)

        return Step(self.model, self.optimizer, draw, capture=not self.settings.eager)

    def go(self, steps: int, seconds: float) -> dict:
        """Train ``steps`` steps through the stages, within ``seconds`` (0: no limit)."""
        settings, budget = self.settings, Budget(seconds)
        curve: list[dict] = []
        tokens = before = 0
        ended = "steps"
        for index, length in enumerate(settings.lengths):
            until = round(steps * sum(settings.shares[: index + 1]))
            if until <= before:
                continue
            length = min(length, self.longest)
            per_step = max(1, settings.batch_tokens // length) * length

            def check(
                taken: int, means: list[float], start=before, seen=tokens, per_step=per_step, length=length
            ) -> bool:
                curve.append(
                    {
                        "step": start + taken, "length": length, "tokens": seen + taken * per_step,
                        "seconds": budget.elapsed(), "loss": means[0],
                    }
                )  # fmt: skip
                return False

            def schedule(progress: float, start=before, until=until) -> float:
                done = (start + progress * (until - start)) / steps
                return self.rate * schedule_factor(done, "cosine", 0.1, 0.01)

            taken, ended = train(
                self.step_at(length), until - before, schedule, max(1, steps // 40), check, lambda: budget.left() < 0
            )
            before, tokens = before + taken, tokens + taken * per_step
            if ended == "budget":
                break
        return {
            "model": self.kind, "seed": self.seed, "parameters": parameter_count(self.model),
            "learning_rate": self.rate, "steps": before, "planned_steps": steps, "tokens": tokens,
            "seconds": budget.elapsed(), "ended": ended, "curve": curve,
        }  # fmt: skip

    def validation_loss(self, validation: Tensor) -> float:
        context = self.settings.lengths[0]
        return float(nats_by_position(self.model, validation, context, validation.numel() // context * context).mean())

    def evaluate(self, heldout: Tensor) -> dict:
        """Perplexity at each context, and by position (powers of two) in the longest."""
        contexts = [c for c in self.settings.contexts if c <= self.longest]
        perplexities = []
        for context in contexts:
            nats = nats_by_position(self.model, heldout, context, self.settings.evaluation_tokens)
            perplexities.append({"context": context, "perplexity": math.exp(nats.mean())})
        by_position = [
            {"from": low, "to": min(2 * low, contexts[-1]), "perplexity": math.exp(nats[low : 2 * low].mean())}
            for low in (2**k for k in range(contexts[-1].bit_length() - 1))
        ]
        return {"perplexities": perplexities, "by_position": by_position}


def markov_baseline(genome: Tensor, heldout: Tensor, settings: Genomics) -> dict:
    """Perplexity of every order on the held-out genome; order and weight chosen on the training genome's end."""
    kept = genome[: -settings.validation_tokens]
    validation = genome[-settings.validation_tokens :]
    strands = [kept, (3 - kept).flip(0)]
    trials = []
    for weight in settings.markov_weights:
        bits = MarkovModel(strands, len(LETTERS), settings.markov_order, weight).bits_per_symbol(validation)
        order = min(range(len(bits)), key=bits.__getitem__)
        trials.append({"weight": weight, "order": order, "validation_perplexity": 2 ** bits[order]})
    best = min(trials, key=lambda trial: trial["validation_perplexity"])
    whole = MarkovModel([genome, (3 - genome).flip(0)], len(LETTERS), settings.markov_order, best["weight"])
    bits = whole.bits_per_symbol(heldout[: settings.evaluation_tokens])
    return {
        "trials": trials, "order": best["order"], "weight": best["weight"],
        "perplexity": 2 ** bits[int(best["order"])], "perplexity_of_order": [2**b for b in bits],
    }  # fmt: skip


def choose(kind: str, kept: Tensor, validation: Tensor, settings: Genomics) -> tuple[float, int, list[dict]]:
    """The rate and the number of steps with the least validation loss, and every trial; what has no rival is not
    tried."""
    first, *others = settings.steps

    def trial(rate: float, steps: int) -> float:
        run = Run(kind, TUNING_SEED, rate, kept, settings)
        run.go(steps, 0.0)
        return run.validation_loss(validation)

    rates, trials = choose_rates((kind,), settings.learning_rates, lambda _, rate: trial(rate, first))
    trials = [{**found, "steps": first} for found in trials]
    rate = rates[kind]
    if not others:
        return rate, first, trials
    losses = {found["steps"]: found["validation_loss"] for found in trials if found["learning_rate"] == rate}
    for steps in others if losses else settings.steps:
        losses[steps] = trial(rate, steps)
        trials.append({"model": kind, "learning_rate": rate, "steps": steps, "validation_loss": losses[steps]})
        say(f"  {trials[-1]}")
    return rate, min(losses, key=losses.__getitem__), trials


def main(arguments: list[str] | None = None) -> Results:
    settings = parse(Genomics, arguments, __doc__ or "")
    device = device_of(settings)
    results = Results("genomics", settings)
    genome, heldout = (read_fasta(Path(settings.data, name)).to(device) for name in (_TRAIN, _HELDOUT))
    needed = max(settings.lengths) + settings.validation_tokens
    if heldout.numel() < settings.evaluation_tokens or genome.numel() < needed:
        raise ValueError(
            f"the genomes have {genome.numel()} and {heldout.numel()} nucleotides, fewer than lengths and "
            f"validation_tokens, or "
            f"evaluation_tokens, ask for ({needed}, {settings.evaluation_tokens}); lower those"
        )
    results.note(markov=markov_baseline(genome, heldout, settings))
    say(f"genomics, Markov: {results.record['markov']['perplexity']:.4f}, {results.budget.elapsed():.0f} s")
    kept, validation = genome[: -settings.validation_tokens], genome[-settings.validation_tokens :]
    chosen = {kind: choose(kind, kept, validation, settings) for kind in settings.models}
    results.note(tuning=[trial for _, _, trials in chosen.values() for trial in trials])
    for seed, kind, _ in results.shares((seed, kind) for seed in settings.seeds for kind in settings.models):
        # A run may take all the time that is left, so that only the last ones can be cut short.
        rate, steps, _ = chosen[kind]
        run = Run(kind, seed, rate, kept, settings)
        record = run.go(steps, 0.9 * results.budget.left() if settings.budget_seconds else 0.0)
        record.update(run.evaluate(heldout))
        results.add(record, record["ended"] == "budget")
        say(f"genomics, {kind}, seed {seed}: {record['perplexities']}")
    return results.finish()


if __name__ == "__main__":
    main()
