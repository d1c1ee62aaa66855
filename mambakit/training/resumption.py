"""What a resumed run may change, what it must not and how that is named, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mambakit.output import say
from mambakit.training.checkpoint import Found
from mambakit.training.config import TrainConfig

# Everything else decides what the model learns, from what, or how that is measured: a run has it once.
MAY_CHANGE = frozenset({
    # how long it goes on (the schedule follows)
    "steps", "epochs", "max_minutes", "max_skipped",
    # where its files lie; the documents themselves are compared by their contents
    "out", "token_cache", "train_files", "heldout_files",
    # what it writes, when, and how the model is saved
    "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "export_dtype", "max_shard_size",
    "sample_prompt",
    # how the same update is computed: processes, memory, launches
    "parallel", "context_parallel", "accumulate", "activation_checkpointing", "recompute_selection", "cuda_graph",
    # what is asked of this start
    "resume", "overwrite", "export_only",
})  # fmt: skip


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as JSON has it: what a run's files hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each field that a resumption must not change and does; a field that was not saved had its default."""
    defaults = plain_config(TrainConfig())
    told = []
    for name in sorted({*saved, *now} - MAY_CHANGE):
        if name not in now:
            told.append(f"{name} was {saved[name]!r}, a field that this mambakit does not have")
        elif (before := saved.get(name, defaults[name])) != now[name]:
            told.append(f"{name} was {before!r}, is {now[name]!r}")
    return told


def require_same_contents(saved: dict[str, str], now: dict[str, str], out: Path) -> None:
    """Refuse other documents or another tokenizer, by the field that brings them; names and places of files do not matter."""
    for field, content in now.items():
        if saved[field] != content:
            raise ValueError(
                f"{field}: the contents differ from those that the run in {out} was started with, so that it cannot go on; give "
                "the same documents, tokenizer and separator, or start a new run in another out (init_from)"
            )


def to_resume_from(
    latest: Path | None, ignored: Sequence[Found], run: str, config: TrainConfig, console: Console
) -> bool:
    """Say what is passed over, and whether there is a checkpoint to go on from; without one the run starts from its beginning.

    Raises:
        ValueError: the run has checkpoints and none of them is whole, or has none and a checkpoint's model is asked for.
    """
    for found in ignored:
        say(console, f"{found.path.name} is passed over: {found.problem}")
    if latest is not None:
        return True
    if any(found.run == run and found.path.suffix != ".tmp" for found in ignored):
        raise ValueError(
            f"no checkpoint in {config.out}/checkpoints is whole, so that the run cannot go on; overwrite=true starts it anew"
        )
    if config.export_only:
        raise ValueError(
            f"export_only=true, but the run in {config.out} had not come to its first checkpoint; train it on"
        )
    say(console, "the run had not come to its first checkpoint: it starts from the beginning")
    return False
