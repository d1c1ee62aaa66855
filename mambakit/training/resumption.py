"""Resuming a run: which settings may change, and from which checkpoint it continues."""

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

# Everything else decides what the model learns, from what, or how that is measured, and is fixed for a run.
MAY_CHANGE = frozenset({
    # its length (the schedule follows)
    "steps", "epochs", "max_minutes", "max_skipped", "early_stopping_patience",
    # where its files are; documents are compared by their contents
    "out", "token_cache", "train_files", "heldout_files",
    # what it writes, when, and how the model is saved
    "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "keep_best", "report_to", "project",
    "export_dtype", "max_shard_size", "sample_prompt",
    # how the same update is computed: processes, memory, launches
    "parallel", "context_parallel", "reduce_dtype", "reshard_after_forward",
    "accumulate", "activation_checkpointing", "recompute_selection", "cuda_graph",
    # flags of this start only
    "resume", "overwrite", "export_only",
})  # fmt: skip


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as JSON types, as a run's files hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each field that changed and must not; a field that was not saved had its default."""
    defaults = plain_config(TrainConfig())
    lines = []
    for name in sorted({*saved, *now} - MAY_CHANGE):
        if name not in now:
            lines.append(f"{name} was {saved[name]!r}, a field that this mambakit does not have")
        elif (before := saved.get(name, defaults[name])) != now[name]:
            lines.append(f"{name} was {before!r}, is {now[name]!r}")
    return lines


def require_same_contents(saved: dict[str, str], now: dict[str, str], out: Path) -> None:
    """ValueError for other documents or another tokenizer; names and places of files do not matter."""
    for field, content in now.items():
        if saved[field] != content:
            raise ValueError(
                f"{field}: the contents differ from those that the run in {out} was started with, so that it cannot "
                "continue; give the same documents, tokenizer and separator, or start a new run in another out "
                "(init_from)"
            )


def to_resume_from(
    latest: Path | None, ignored: Sequence[Found], run: str, config: TrainConfig, console: Console
) -> bool:
    """Whether there is a checkpoint to continue from; prints which ones are ignored, and whether the run starts over.

    Raises:
        ValueError: all of the run's checkpoints are damaged, or there is none and its model is to be exported.
    """
    for found in ignored:
        say(console, f"{found.path.name} is ignored: {found.problem}")
    if latest is not None:
        return True
    if any(found.run == run and found.path.suffix != ".tmp" for found in ignored):
        raise ValueError(
            f"no checkpoint in {config.out}/checkpoints is whole, so that the run cannot continue; overwrite=true "
            "starts "
            "it again"
        )
    if config.export_only:
        raise ValueError(
            f"export_only=true, but the run in {config.out} had not reached its first checkpoint; continue its training"
        )
    say(console, "the run had not reached its first checkpoint: it starts from the beginning")
    return False
