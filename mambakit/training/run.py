"""The loop of a run: step, log, evaluate, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mambakit.output import say
from mambakit.training.best import Best
from mambakit.training.checkpoint import load_checkpoint, save_checkpoint
from mambakit.training.config import TrainConfig
from mambakit.training.curve import sparkline, write_curve
from mambakit.training.data import ShuffledRows, StatefulRows, TokenStore
from mambakit.training.data.rows import cut_rows
from mambakit.training.distributed import ProcessMesh
from mambakit.training.evaluate import sample_loss
from mambakit.training.folder import RunFolder
from mambakit.training.guard import weights_are_finite
from mambakit.training.optimizer import make_optimizer, rates_to_device, schedule_factor, set_learning_rate
from mambakit.training.prepare import Prepared
from mambakit.training.report import FinalLoss, remedy
from mambakit.training.resumption import plain_config, require_same_contents, to_resume_from
from mambakit.training.step import CapturedStep, Objective, TrainingStep
from mambakit.training.telemetry import Telemetry
from mambakit.training.throughput import flops_per_token, peak_flops
from mambakit.training.trackers import open_trackers

# Steps after which several processes agree on the time that is left; one process looks at its clock after each step.
_CLOCK_EVERY = 20


class Run:
    """The state of the training loop, and its schedule of logs, evaluations and checkpoints."""

    def __init__(
        self, config: TrainConfig, model: Any, data: Prepared, folder: RunFolder | None, console: Console,
        mesh: ProcessMesh,
    ):  # fmt: skip
        self.config, self.model, self.folder, self.console, self.mesh = config, model, folder, console, mesh
        self.out = Path(config.out)
        self.run = mesh.share(None if folder is None else folder.run)
        self.heldout: TokenStore | None = data.heldout
        self.contents = {
            "train_files": data.train.fingerprint,
            "heldout_files": "" if data.heldout is None else data.heldout.fingerprint,
            "tokenizer": data.vocabulary.fingerprint,
        }
        device = next(model.parameters()).device
        how = (
            data.train, config.sequence_length, config.batch_size, config.seed, device,
            data.vocabulary.complement if config.reverse_complement else None, data.vocabulary.end,
        )  # fmt: skip
        self.rows = StatefulRows(*how, config.fresh_rows) if config.stateful else ShuffledRows(*how)
        self.steps = config.steps or max(1, round(config.epochs * self.rows.steps_per_epoch))
        objective = mesh.parallelize(
            Objective(model), model, reduce_dtype=getattr(torch, config.reduce_dtype),
            reshard_after_forward=config.reshard_after_forward,
        )  # fmt: skip
        self.optimizer = make_optimizer(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
        self.plain = TrainingStep(
            model, self.optimizer, config.clip, config.autocast, config.respect_documents,
            accumulate=config.accumulate, spike_factor=config.spike_factor,
            ignored_token=data.vocabulary.unknown if config.ambiguous == "mask" else None,
            carry_rows=config.batch_size if config.stateful else 0, processes=mesh, objective=objective,
        )  # fmt: skip
        captured = config.cuda_graph and device.type == "cuda" and mesh.capturable
        self.stepper = CapturedStep(self.plain) if captured else self.plain
        self.step, self.seconds = 0, 0.0
        self.losses: list[torch.Tensor] = []
        self.skipped = 0
        self.telemetry: Telemetry | None = None
        self.saved = 0  # the step of the latest checkpoint
        self.best = Best(self.out / "checkpoints", self.run, config.keep_best)
        self.peak = peak_flops(device, config.autocast)
        self.flops = flops_per_token(model)
        if config.resume:
            self._restore()

    def _restore(self) -> None:
        latest, ignored = self.mesh.share(None if self.folder is None else self.folder.latest())
        if not to_resume_from(latest, ignored, self.run, self.config, self.console):
            return
        self.step, extra = load_checkpoint(latest, self.model, self.optimizer, self.mesh)
        require_same_contents(extra["contents"], self.contents, self.out)
        rates_to_device(self.optimizer, self.plain.device)
        self.seconds, self.skipped, self.saved = extra["seconds"], extra["skipped"], self.step
        self.losses = [loss.to(self.plain.device) for loss in extra["losses"]]
        self.plain.load_state_dict(extra["stepper"])
        if "best" in extra and (note := self.best.load_state_dict(extra["best"])):
            say(self.console, note)
        say(self.console, f"continuing from step {self.step}")

    def _save(self) -> None:
        if int(self.plain.guard.in_a_row):
            say(self.console, f"step {self.step}: no checkpoint, since the latest update was skipped")
            return
        if not weights_are_finite(self.model, self.mesh):
            say(self.console, f"step {self.step}: no checkpoint, since the weights are not finite any more")
            return
        extra = {
            "contents": self.contents,
            "seconds": self.seconds, "skipped": self.skipped, "losses": self.losses, "stepper": self.plain.state_dict(),
            "best": self.best.state_dict(),
        }  # fmt: skip
        save_checkpoint(
            self.out / "checkpoints", self.model, self.optimizer, self.step, extra, self.config.keep_checkpoints,
            self.mesh, self.run, plain_config(self.config),
        )  # fmt: skip
        self.saved = self.step
        if self.mesh.first:
            self.best.checkpointed()

    def final_loss(self) -> FinalLoss:
        """The last recorded training loss, and the steps of which it is the mean."""
        history = self.telemetry.history if self.telemetry is not None else []
        for number in range(len(history) - 1, -1, -1):
            if history[number]["loss"] is not None:
                first = history[number - 1]["step"] + 1 if number else 1
                return FinalLoss(history[number]["loss"], first, history[number]["step"])
        return FinalLoss(None, 0, 0)

    def progress(self) -> float:
        """The fraction of the run that is done: by steps, or by time where there is a budget."""
        if self.config.max_minutes:
            return min(1.0, self.seconds / (60 * self.config.max_minutes))
        return min(1.0, self.step / self.steps)

    def over(self) -> bool:
        if self.config.export_only or self.best.worn_out(self.config.early_stopping_patience):
            return True
        return self.progress() >= 1 if self.config.max_minutes else self.step >= self.steps

    def go(self) -> None:
        config = self.config
        began = time.monotonic() - self.seconds
        self._last = time.monotonic(), self.step
        if self.mesh.first:
            shown = plain_config(config)
            trackers = open_trackers(config.report_to, self.out, self.run, config.project, shown, self.step)
            self.telemetry = Telemetry(self.out, self.console, trackers, self.step)
        if self.over() and self.step and not config.export_only:
            say(self.console, f"step {self.step}: nothing left to train: the model is written again")
        first, rate, norm = self.step, 0.0, torch.zeros((), dtype=torch.float32, device="cpu")
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
                if self.step % config.log_every == 0 or (self.step == self.steps and not config.max_minutes):
                    self._log(rate, norm, began)
                elif config.max_minutes and (self.mesh.world == 1 or self.step % _CLOCK_EVERY == 0):
                    self.seconds = self.mesh.agree(time.monotonic() - began)
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
            if self.losses and self.step > first:  # max_minutes ended the run between two records
                self._log(rate, norm, began)
        if self.best.worn_out(config.early_stopping_patience) and self.step > first:
            say(
                self.console,
                f"step {self.step}: no lower held-out loss in {self.best.since} evaluations: the run ends early",
            )
        self._require_finite(rate)
        self.seconds = self.mesh.agree(time.monotonic() - began)
        if config.checkpoint_every and self.saved != self.step:
            self._save()
        if self.telemetry is None:
            return
        history = self.telemetry.history
        say(
            self.console,
            f"loss {sparkline([r['loss'] for r in history if r['loss'] is not None])} {self.step} steps, "
            f"{self.seconds:.0f} s",
        )
        write_curve(history, self.out / "loss.png", self.console)

    def _require_finite(self, rate: float) -> None:
        """Raise where the weights give no finite loss: the run then writes neither checkpoint nor model."""
        few = self.mesh.data_size
        rows, begins = self.rows.batch(max(0, self.step - 1))
        loss = float(self.plain.loss(rows[:few], begins[:few]))
        if math.isfinite(loss) and weights_are_finite(self.model, self.mesh):
            return
        raise FloatingPointError(
            f"the loss is {loss} at step {self.step} (learning rate {rate:.2e}) and no model is written: the weights "
            "give "
            f"no finite numbers any more; {remedy(self.saved)}"
        )

    def _log(self, rate: float, norm: torch.Tensor, began: float) -> None:
        losses = torch.stack(self.losses)  # one device-to-host synchronisation in log_every steps
        self.losses.clear()
        finite = losses[torch.isfinite(losses)]
        mean = float(finite.mean()) if len(finite) else None
        self._report_skipped(rate)
        now = time.monotonic()
        self.seconds = self.mesh.agree(now - began)
        tokens = (self.step - self._last[1]) * self.config.batch_size * self.config.sequence_length
        per_second = tokens / (now - self._last[0])
        self._last = now, self.step
        record = {
            "step": self.step, "loss": mean, "learning_rate": rate,
            "gradient_norm": float(norm) if torch.isfinite(norm) else None,
            "tokens_per_second": per_second, "seconds": self.seconds,
        }  # fmt: skip
        if self.peak is not None:
            record["mfu"] = per_second * self.flops / (self.peak * self.mesh.world)
        if self.skipped:
            record["skipped"] = self.skipped
        if self.heldout is not None and self._evaluates():
            heldout = record["heldout_loss"] = sample_loss(self.plain, self.heldout, self.config.sequence_length)
            lower = self.best.look(heldout, self.step, self.model, self.mesh)
            shown = "not finite" if mean is None else f"{mean:.4f}"
            kept = ", kept" if lower and self.config.keep_best else ""
            say(self.console, f"step {self.step}: loss {shown}, held out {heldout:.4f}{kept}")
        if self.telemetry is not None:
            self.telemetry.write(record, self.progress())

    def _evaluates(self) -> bool:
        """Whether the held-out text is read at this record: at intervals; with `keep_best` the last weights, too."""
        last = self.config.keep_best and self.progress() >= 1
        return last or self.step % self.config.eval_every < self.config.log_every

    def _report_skipped(self, rate: float) -> None:
        """Report skipped updates, and stop the run after `max_skipped` in a row."""
        guard = self.plain.guard
        skipped, in_a_row = int(guard.skipped), int(guard.in_a_row)
        if skipped == self.skipped:
            return
        what = f"gradient norm up to {float(guard.worst):.2e} against a mean of {float(guard.mean):.2e}"
        say(
            self.console,
            f"step {self.step}: {skipped - self.skipped} of the last updates skipped ({what}); parameters and "
            "optimiser are as they were before them",
        )
        self.skipped = skipped
        guard.worst.zero_()
        if in_a_row >= self.config.max_skipped:
            raise FloatingPointError(
                f"{in_a_row} updates in a row were skipped at step {self.step} (learning rate {rate:.2e}, {what}); the "
                f"last checkpoint is in {self.out / 'checkpoints'}; lower learning_rate or clip"
            )
