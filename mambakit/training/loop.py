"""The training run: prepare, step, log, evaluate, checkpoint, export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mambakit.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mambakit.training.config import TrainConfig
from mambakit.training.curve import sparkline, write_curve
from mambakit.training.data import ShuffledRows, StatefulRows, TokenStore
from mambakit.training.data.rows import cut_rows
from mambakit.training.distributed import Processes, processes
from mambakit.training.evaluate import sample_loss
from mambakit.training.export import export
from mambakit.training.lora import merge_adapters, save_adapters
from mambakit.training.model import make_model
from mambakit.training.optimizer import make_optimizer, rates_to_device, schedule_factor, set_learning_rate
from mambakit.training.prepare import Prepared, prepare
from mambakit.training.step import CapturedStep, Objective, TrainingStep
from mambakit.training.telemetry import Telemetry, record_environment
from mambakit.training.throughput import flops_per_token, peak_flops


def train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Run a training from start (or checkpoint) to exported model; returns the summary that the model card holds.

    With ``config.parallel``, torchrun starts several of these, which share ``config.out``. How PyTorch multiplies float32 matrices is the
    recipe's while it runs (TensorFloat-32 beside bfloat16) and the caller's afterwards; the random state is left where the run left it.
    """
    precision = "high" if config.autocast == "bfloat16" else "highest"
    with _float32_products(precision), processes(config.parallel, config.context_parallel) as team:
        team.require_even(config.batch_size // config.accumulate, "batch_size / accumulate")
        return _train(config, console if team.first else Console(quiet=True), team)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _train(config: TrainConfig, console: Console, team: Processes) -> dict[str, Any]:
    out = Path(config.out)
    if config.resume and not (out / "train_config.json").is_file():
        raise ValueError(f"resume=true, but no run was ever started in {out}; start without resume, or correct out")
    if team.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json.tmp").write_text(json.dumps(dataclasses.asdict(config), indent=2))
        (out / "config.json.tmp").replace(out / "train_config.json")
        record_environment(out, team.device)
    torch.manual_seed(config.seed)

    # The first process writes the vocabulary and the tokens; the others read them.
    data = prepare(config, out, console) if team.first else None
    team.barrier()
    data = data or prepare(config, out, console, written=True)
    model = make_model(config, data.vocabulary, console).to(team.device)
    run = _Run(config, model, data, out, console, team)
    _announce(run, data)
    run.go()
    summary = None
    whole = team.whole(model)
    if whole is not None:
        if config.lora_rank:
            save_adapters(whole, out / "adapter")
            merge_adapters(whole)
        summary = export(whole, data, config, out, console, steps=run.step, seconds=run.seconds)
    return team.share(summary)


def _announce(run: _Run, data: Prepared) -> None:
    every = sum(p.numel() for p in run.model.parameters())
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    characters = int(data.train.characters.sum())
    only = "" if learning == every else f" ({learning:,} of them learn)"
    if not run.team.capturable:
        count = "1 process" if run.team.world == 1 else f"{run.team.world} processes"
        spread = f", a row over {run.team.context_size}" if run.team.context_size > 1 else ""
        run.console.print(f"{count}, {run.team.mode}{spread}; the step runs without a CUDA graph")
    if run.config.max_minutes:
        run.console.print(f"the run ends after max_minutes={run.config.max_minutes:g}; steps and epochs do not count")
    run.console.print(
        f"{every:,} parameters{only} on {run.plain.device}; {data.train.tokens:,} tokens of {characters:,} "
        f"{data.vocabulary.unit}s in {len(data.train):,} documents; {run.rows.steps_per_epoch:,.1f} steps an epoch"
    )


class _Run:
    """The loop's own state: where it is, what it has seen, and when to do what."""

    def __init__(
        self, config: TrainConfig, model: Any, data: Prepared, out: Path, console: Console, team: Processes
    ):  # fmt: skip
        self.config, self.model, self.out, self.console, self.team = config, model, out, console, team
        self.heldout: TokenStore | None = data.heldout
        self.fingerprint = data.train.fingerprint
        device = next(model.parameters()).device
        how = (
            data.train, config.sequence_length, config.batch_size, config.seed, device,
            data.vocabulary.complement if config.reverse_complement else None, data.vocabulary.end,
        )  # fmt: skip
        self.rows = StatefulRows(*how, config.fresh_rows) if config.stateful else ShuffledRows(*how)
        self.steps = config.steps or max(1, round(config.epochs * self.rows.steps_per_epoch))
        objective = team.parallelize(Objective(model), model)
        self.optimizer = make_optimizer(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
        self.plain = TrainingStep(
            model, self.optimizer, config.clip, config.autocast, config.respect_documents,
            accumulate=config.accumulate, spike_factor=config.spike_factor,
            ignored_token=data.vocabulary.unknown if config.ambiguous == "mask" else None,
            carry_rows=config.batch_size if config.stateful else 0, processes=team, objective=objective,
        )  # fmt: skip
        captured = config.cuda_graph and device.type == "cuda" and team.capturable
        self.stepper = CapturedStep(self.plain) if captured else self.plain
        self.step, self.seconds = 0, 0.0
        self.losses: list[torch.Tensor] = []
        self.skipped = 0
        self.peak = peak_flops(device, config.autocast)
        self.flops = flops_per_token(model)
        if config.resume:
            self._restore()
        self.telemetry = Telemetry(out, console, config.tensorboard, self.step) if team.first else None

    def _restore(self) -> None:
        found = checkpoints(self.out / "checkpoints")
        if not found:
            self.console.print("the run had not come to its first checkpoint: it starts from the beginning")
            return
        self.step, extra = load_checkpoint(found[-1], self.model, self.optimizer, self.team)
        if extra["data"] != self.fingerprint:
            raise ValueError(
                f"the documents differ from those that the run in {self.out} was started with, so that it cannot go on; "
                "give the same files, tokenizer and separator, or start a new run with init_from"
            )
        rates_to_device(self.optimizer, self.plain.device)
        self.seconds, self.skipped = extra["seconds"], extra["skipped"]
        self.losses = [loss.to(self.plain.device) for loss in extra["losses"]]
        self.plain.load_state_dict(extra["stepper"])
        self.console.print(f"continuing from step {self.step}")

    def _save(self) -> None:
        if int(self.plain.guard.in_a_row):
            self.console.print(f"step {self.step}: no checkpoint, since the latest update was skipped")
            return
        extra = {
            "data": self.fingerprint,
            "seconds": self.seconds, "skipped": self.skipped, "losses": self.losses, "stepper": self.plain.state_dict(),
        }  # fmt: skip
        save_checkpoint(
            self.out / "checkpoints", self.model, self.optimizer, self.step, extra, self.config.keep_checkpoints,
            self.team,
        )  # fmt: skip

    def progress(self) -> float:
        """How much of the run is over: by steps, or by time where there is a budget."""
        if self.config.max_minutes:
            return min(1.0, self.seconds / (60 * self.config.max_minutes))
        return min(1.0, self.step / self.steps)

    def over(self) -> bool:
        if self.config.export_only:
            return True
        return self.progress() >= 1 if self.config.max_minutes else self.step >= self.steps

    def go(self) -> None:
        config = self.config
        began = time.monotonic() - self.seconds
        self._last = time.monotonic(), self.step
        saved = self.step
        with self.telemetry or contextlib.nullcontext():
            while not self.over():
                progress = self.progress()
                factor = schedule_factor(progress, config.schedule, config.warmup, config.final_learning_rate)
                rate = config.learning_rate * factor
                set_learning_rate(self.optimizer, rate)
                rows = cut_rows(*self.rows.batch(self.step), config.row_length(progress))
                self.plain.forget(self.rows.fresh(self.step))
                loss, norm = self.stepper.run(*rows)
                self.losses.append(loss)
                self.step += 1
                if self.step % config.log_every == 0 or self.step == self.steps:
                    self._log(rate, norm, began)
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
                    saved = self.step
        self.seconds = self.team.agree(time.monotonic() - began)
        if config.checkpoint_every and saved != self.step:
            self._save()
        if self.telemetry is None:
            return
        history = self.telemetry.history
        self.console.print(
            f"loss {sparkline([r['loss'] for r in history if r['loss'] is not None])} {self.step} steps, "
            f"{self.seconds:.0f} s"
        )
        write_curve(history, self.out / "loss.png", self.console)

    def _log(self, rate: float, norm: torch.Tensor, began: float) -> None:
        losses = torch.stack(self.losses)  # one wait for the device in log_every steps
        self.losses.clear()
        finite = losses[torch.isfinite(losses)]
        mean = float(finite.mean()) if len(finite) else None
        self._report_skipped(rate)
        now = time.monotonic()
        self.seconds = self.team.agree(now - began)
        tokens = (self.step - self._last[1]) * self.config.batch_size * self.config.sequence_length
        per_second = tokens / (now - self._last[0])
        self._last = now, self.step
        record = {
            "step": self.step, "loss": mean, "learning_rate": rate,
            "gradient_norm": float(norm) if torch.isfinite(norm) else None,
            "tokens_per_second": per_second, "seconds": self.seconds,
        }  # fmt: skip
        if self.peak is not None:
            record["mfu"] = per_second * self.flops / (self.peak * self.team.world)
        if self.skipped:
            record["skipped"] = self.skipped
        if self.heldout is not None and self.step % self.config.eval_every < self.config.log_every:
            record["heldout_loss"] = sample_loss(self.plain, self.heldout, self.config.sequence_length)
            shown = "not finite" if mean is None else f"{mean:.4f}"
            self.console.print(f"step {self.step}: loss {shown}, held out {record['heldout_loss']:.4f}")
        if self.telemetry is not None:
            self.telemetry.write(record, self.progress())

    def _report_skipped(self, rate: float) -> None:
        """Say which updates were not made, and stop where none is made any more."""
        guard = self.plain.guard
        skipped, in_a_row = int(guard.skipped), int(guard.in_a_row)
        if skipped == self.skipped:
            return
        what = f"gradient norm up to {float(guard.worst):.2e} against a mean of {float(guard.mean):.2e}"
        self.console.print(
            f"step {self.step}: {skipped - self.skipped} of the last updates skipped ({what}); parameters and optimiser "
            "are as they were before them"
        )
        self.skipped = skipped
        guard.worst.zero_()
        if in_a_row >= self.config.max_skipped:
            raise FloatingPointError(
                f"{in_a_row} updates in a row were skipped at step {self.step} (learning rate {rate:.2e}, {what}); the last "
                f"checkpoint is in {self.out / 'checkpoints'}; lower learning_rate or clip"
            )
