"""What a run prints at its beginning and at its end, in plain lines for terminals and pipes."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

from rich.console import Console

from mambakit.output import say
from mambakit.training.config import TrainConfig
from mambakit.training.distributed import ProcessMesh
from mambakit.training.prepare import Prepared
from mambakit.training.tokenizer import Vocabulary


class FinalLoss(NamedTuple):
    """The mean training loss (nats per token) over steps ``first`` to ``last``; None where none was recorded."""

    mean: float | None
    first: int
    last: int


def announce(
    model: Any, data: Prepared, config: TrainConfig, mesh: ProcessMesh, steps_per_epoch: float, console: Console
) -> None:
    every = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    characters = int(data.train.characters.sum())
    only = "" if learning == every else f" ({learning:,} of them learn)"
    if not mesh.capturable:
        count = "1 process" if mesh.world == 1 else f"{mesh.world} processes"
        spread = f", a row over {mesh.context_size}" if mesh.context_size > 1 else ""
        say(console, f"{count}, {mesh.mode}{spread}; the step runs without a CUDA graph")
    if config.max_minutes:
        say(console, f"the run ends after max_minutes={config.max_minutes:g}; steps and epochs do not count")
    say(
        console,
        f"{every:,} parameters{only} on {mesh.device}; {data.train.tokens:,} tokens of {characters:,} "
        f"{data.vocabulary.unit}s in {len(data.train):,} documents; {steps_per_epoch:,.1f} steps an epoch",
    )


def generate_command(config: TrainConfig, vocabulary: Vocabulary) -> str:
    """The command line that writes with the model of a run, quoted for a shell."""
    prompt = "ACGTACGT" if vocabulary.kind == "nucleotides" else config.sample_prompt.strip() or "Once upon a time"
    out = str(config.out)
    folder = shlex.quote(f"./{out}" if out.startswith("-") else out)
    return f"mambakit generate --model {folder} {'-- ' if prompt.startswith('-') else ''}{_quoted(prompt)}"


def state_command(config: TrainConfig, vocabulary: Vocabulary, file: str) -> str:
    """The command line that writes from a tuned state."""
    prompt = "ACGTACGT" if vocabulary.kind == "nucleotides" else config.sample_prompt.strip() or "Once upon a time"
    state = shlex.quote(f"{config.out}/{file}")
    return (
        f"mambakit generate --model {shlex.quote(config.init_from)} --load-state {state} "
        f"{'-- ' if prompt.startswith('-') else ''}{_quoted(prompt)}"
    )


def _quoted(text: str) -> str:
    """In double quotes where that is safe, as one writes a prompt by hand."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def say_end(summary: dict[str, Any], config: TrainConfig, vocabulary: Vocabulary, console: Console) -> None:
    """Print the losses, where the model is, and how to generate with it."""
    training, heldout = summary["training_loss"], summary["heldout_loss"]
    first, last = summary["training_loss_steps"]
    steps = f"step {last}" if first == last else f"mean of steps {first} to {last}"
    say(
        console, f"training loss: {'not on record' if training is None else f'{training:.4f} nats per token ({steps})'}"
    )
    if heldout is None:
        how = "validation_fraction=0.05 holds a part out, heldout_files names other files"
        say(console, f"held-out loss: not measured; {how}")
    else:
        unit = vocabulary.unit
        say(
            console,
            f"held-out loss: {heldout:.4f} nats per token, {summary[f'heldout_bits_per_{unit}']:.4f} bits per {unit}, "
            "of "
            f"{summary[f'heldout_{unit}s']:,} {unit}s",
        )
    what = "state" if config.tune == "state" else "model"
    say(console, f"{what} written to {summary.get('state', config.out)}")
    say(console, f"write with it: {summary['generate']}")


def interrupted(step: int, saved: int) -> str:
    """The message after Ctrl-C; ``saved`` is the step of the latest checkpoint, 0 without one."""
    if not saved:
        return f"stopped at step {step}, before the first checkpoint: resume=true starts from the beginning"
    return f"stopped at step {step}: resume=true continues from the checkpoint of step {saved}"


def remedy(saved: int) -> str:
    """What to do about a loss that is not a number."""
    if not saved:
        return "there is no checkpoint: start anew (overwrite=true) with a lower learning_rate or clip"
    return (
        f"the latest checkpoint is of step {saved}: resume=true export_only=true writes its model, and a new run "
        "(init_from, "
        "another out) goes on from there with a lower learning_rate or clip"
    )
