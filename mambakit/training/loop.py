"""`train`: from a configuration to an exported model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mambakit.output import say
from mambakit.training.claim import claim
from mambakit.training.config import TrainConfig
from mambakit.training.data.store import remove_tokens
from mambakit.training.distributed import ProcessMesh, process_mesh
from mambakit.training.export import export
from mambakit.training.float8 import plain_layers, require_float8, use_float8
from mambakit.training.folder import RunFolder
from mambakit.training.lora import merge_adapters, save_adapters
from mambakit.training.model import make_model
from mambakit.training.prepare import prepare
from mambakit.training.report import announce, interrupted, say_end
from mambakit.training.run import Run
from mambakit.training.state_export import export_state
from mambakit.training.telemetry import record_environment


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C after a run had begun; the first process's message says which step it reached and how to continue."""


def train(config: TrainConfig, console: Console, report: Console | None = None) -> dict[str, Any]:
    """Run a training from start (or checkpoint) to exported model; returns the summary that the model card holds.

    With ``config.parallel``, torchrun starts several processes of this, which share ``config.out``. The precision of
    float32 matrix products is the recipe's during the run (TensorFloat-32 beside bfloat16), and the caller's again
    afterwards. The random state is left as the run leaves it.

    Args:
        console: for messages during the run.
        report: for the report at its end (see `mambakit.training.report`); ``console`` when absent.

    Raises:
        ValueError: the configuration does not fit the files, the processes, or ``config.out``, which holds one run
            alone.
        FloatingPointError: the loss or the weights are not finite; no model is written.
        RunInterrupted: Ctrl-C after the first step.
    """
    precision = "high" if config.autocast == "bfloat16" else "highest"
    with _float32_products(precision), process_mesh(config.parallel, config.context_parallel) as mesh:
        mesh.require_even(config.batch_size // config.accumulate, "batch_size / accumulate")
        if not mesh.first:
            console = report = Console(quiet=True)
        with claim(config, mesh) as folder:
            return _train(config, folder, console, report or console, mesh)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _train(
    config: TrainConfig, folder: RunFolder | None, console: Console, report: Console, mesh: ProcessMesh
) -> dict[str, Any]:
    """``folder`` is None except at the first process: the others write only their shards of checkpoints."""
    out = Path(config.out)
    # The first process makes the vocabulary and the tokens; the others read them.
    data = prepare(config, out, console) if folder is not None else None
    vocabulary = mesh.share(None if data is None else dataclasses.replace(data.vocabulary, source=None))
    data = data or prepare(config, out, console, vocabulary)
    torch.manual_seed(config.seed)
    if config.float8:
        require_float8(mesh.device)
    model = make_model(config, data.vocabulary, console).to(mesh.device)
    if config.float8:
        tokens = config.batch_size * config.sequence_length // config.accumulate // mesh.world
        use_float8(model, tokens)
    run = Run(config, model, data, folder, console, mesh)
    # All checks are done. From here on the folder is this run's.
    if folder is not None:
        folder.begin()
        folder.place("tokenizer", data.vocabulary.save)
        record_environment(out, mesh.device)
        if not config.token_cache:
            remove_tokens(out / "tokens", data.cached)
    announce(model, data, config, mesh, run.rows.steps_per_epoch, console)
    try:
        run.go()
    except KeyboardInterrupt as error:
        raise RunInterrupted(interrupted(run.step, run.saved) if mesh.first else "") from error
    summary: dict[str, Any] | None = None
    whole = mesh.whole(model)
    if whole is not None:
        plain_layers(whole)
    best = run.best.step if config.keep_best else 0
    if whole is not None and folder is not None and best:
        run.best.restore(whole)
        say(console, f"the weights of step {best} are written: held-out loss {run.best.loss:.4f}")
    if whole is not None and folder is not None and config.tune == "state":
        summary = export_state(
            whole, data, config, folder, steps=run.step, seconds=run.seconds, training_loss=run.final_loss()
        )
        say_end(summary, config, data.vocabulary, report)
    elif whole is not None and folder is not None:
        if config.lora_rank:
            folder.place("adapter", lambda temporary: save_adapters(whole, temporary / "adapter"))
            merge_adapters(whole)
        loss = run.final_loss()
        lengths: dict[str, Any] = {"steps": run.step, "seconds": run.seconds}
        summary = export(whole, data, config, folder, **lengths, training_loss=loss, best_step=best)
        say_end(summary, config, data.vocabulary, report)
    return mesh.share(summary)
