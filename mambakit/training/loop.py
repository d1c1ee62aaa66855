"""The training run: prepare, step, log, evaluate, checkpoint, export."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mambakit.models.auto import AutoModelForCausalLM
from mambakit.models.configuration import MambaConfig
from mambakit.models.mamba import MambaForCausalLM
from mambakit.training.checkpoint import load_checkpoint, save_checkpoint
from mambakit.training.config import TrainConfig
from mambakit.training.curve import sparkline, write_curve
from mambakit.training.data import TokenRows, encode, read_documents
from mambakit.training.evaluate import sample_loss
from mambakit.training.export import export
from mambakit.training.optimizer import make_optimizer, schedule_factor, set_learning_rate
from mambakit.training.step import CapturedStep, TrainingStep
from mambakit.training.tokenizer import END, load_tokenizer, save_tokenizer, train_tokenizer


def train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Run a training from start (or checkpoint) to exported model; returns the summary that the model card holds."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json.tmp").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    (out / "config.json.tmp").replace(out / "train_config.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high" if config.autocast == "bfloat16" else "highest")

    with console.status("reading text"):
        documents = read_documents(config.train_files, config.separator)
        heldout = read_documents(config.heldout_files, config.separator) if config.heldout_files else []
    with console.status("tokenising"):
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        elif config.resume:
            tokenizer = load_tokenizer(out)
        else:
            tokenizer = train_tokenizer(documents, config.vocab_size)
        save_tokenizer(tokenizer, out)
        train_tokens, heldout_tokens = encode(tokenizer, documents), encode(tokenizer, heldout)
    rows = TokenRows(train_tokens, config.sequence_length, config.batch_size, config.seed, device)
    model = _make_model(config, tokenizer).to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    characters = sum(map(len, documents))
    console.print(
        f"{parameters:,} parameters on {device}; {rows.tokens_per_epoch:,} tokens of {characters:,} characters "
        f"({characters / rows.tokens_per_epoch:.2f} each); {rows.steps_per_epoch} steps an epoch"
    )
    run = _Run(config, model, rows, heldout_tokens, out, console)
    run.go()
    return export(
        run.model, tokenizer, config, out, console,
        heldout=heldout, steps=run.step, tokens=run.step * config.batch_size * config.sequence_length,
        seconds=run.seconds, train_characters=characters,
    )  # fmt: skip


def _make_model(config: TrainConfig, tokenizer) -> MambaForCausalLM:
    vocabulary = tokenizer.get_vocab_size()
    if config.init_from:
        model = AutoModelForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
        if model.config.vocab_size < vocabulary:
            raise ValueError(
                f"the tokenizer has {vocabulary} tokens but {config.init_from} only {model.config.vocab_size}; "
                "set `tokenizer` to the checkpoint's own"
            )
        return model
    end = tokenizer.token_to_id(END)
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=-(-vocabulary // 8) * 8,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            state_size=config.state_size,
            expand=config.expand,
            conv_kernel=config.conv_kernel,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


class _Run:
    """The loop's own state: where it is, what it has seen, and when to do what."""

    def __init__(self, config: TrainConfig, model, rows: TokenRows, heldout: list, out: Path, console: Console):
        self.config, self.model, self.rows, self.heldout = config, model, rows, heldout
        self.out, self.console = out, console
        self.steps = config.steps or max(1, round(config.epochs * rows.steps_per_epoch))
        self.optimizer = make_optimizer(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
        self.plain = TrainingStep(model, self.optimizer, config.clip, config.autocast, config.respect_documents)
        captured = config.cuda_graph and self.plain.device.type == "cuda"
        self.stepper = CapturedStep(self.plain) if captured else self.plain
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        if config.resume:
            self.step, self.seconds = load_checkpoint(out / "checkpoint", model, self.optimizer)
            console.print(f"continuing from step {self.step}")

    def progress(self) -> float:
        """How much of the run is over: by steps, or by time where there is a budget."""
        if self.config.max_minutes:
            return min(1.0, self.seconds / (60 * self.config.max_minutes))
        return min(1.0, self.step / self.steps)

    def over(self) -> bool:
        return self.progress() >= 1 if self.config.max_minutes else self.step >= self.steps

    def go(self) -> None:
        config = self.config
        began = time.monotonic() - self.seconds
        last_time, last_step = time.monotonic(), self.step
        losses: list[torch.Tensor] = []
        columns = (
            SpinnerColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with (
            open(self.out / "metrics.jsonl", "a" if config.resume else "w", encoding="utf-8") as metrics,
            Progress(*columns, console=self.console, transient=True) as bar,
        ):
            task = bar.add_task("training", total=1.0)
            while not self.over():
                factor = schedule_factor(self.progress(), config.schedule, config.warmup, config.final_learning_rate)
                rate = config.learning_rate * factor
                set_learning_rate(self.optimizer, rate)
                loss, norm = self.stepper.run(*self.rows.batch(self.step))
                losses.append(loss)
                self.step += 1
                if self.step % config.log_every == 0 or self.step == self.steps:
                    mean = torch.stack(losses).mean().item()  # the one host sync in log_every steps
                    losses.clear()
                    now = time.monotonic()
                    self.seconds = now - began
                    per_second = (
                        (self.step - last_step) * config.batch_size * config.sequence_length / (now - last_time)
                    )
                    last_time, last_step = now, self.step
                    record = {
                        "step": self.step, "loss": mean, "learning_rate": rate, "gradient_norm": float(norm),
                        "tokens_per_second": per_second, "seconds": self.seconds,
                    }  # fmt: skip
                    if not math.isfinite(mean):
                        raise FloatingPointError(
                            f"the loss is {mean} at step {self.step} (learning rate {rate:.2e}, gradient norm "
                            f"{float(norm):.2e}); the last checkpoint is in {self.out / 'checkpoint'}; "
                            "lower learning_rate or clip"
                        )
                    if self.heldout and self.step % config.eval_every < config.log_every:
                        record["heldout_loss"] = sample_loss(self.plain, self.heldout, config.sequence_length)
                        self.console.print(f"step {self.step}: loss {mean:.4f}, held out {record['heldout_loss']:.4f}")
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    self.history.append(record)
                    text = f"step {self.step} loss {mean:.3f} lr {rate:.1e} {per_second:,.0f} tokens/s"
                    bar.update(task, completed=self.progress(), description=text)
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    save_checkpoint(self.out / "checkpoint", self.model, self.optimizer, self.step, self.seconds)
        self.seconds = time.monotonic() - began
        if config.checkpoint_every:
            save_checkpoint(self.out / "checkpoint", self.model, self.optimizer, self.step, self.seconds)
        self.console.print(
            f"loss {sparkline([r['loss'] for r in self.history])} {self.step} steps, {self.seconds:.0f} s"
        )
        write_curve(self.history, self.out / "loss.png", self.console)
