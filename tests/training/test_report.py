"""How a run ends: its losses, the model's folder and a command that uses it; and unplanned ends."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import mambakit.training.run as training_run
from mambakit import cli
from mambakit.output import say
from mambakit.training import loop
from mambakit.training.config import TrainConfig
from mambakit.training.data.store import TokenStore
from mambakit.training.report import generate_command
from mambakit.training.step import TrainingStep
from mambakit.training.tokenizer import make_vocabulary
from tests.training.launch import launch
from tests.training.test_folder import config_of, no_pictures, train  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]


def lines(said: str) -> dict[str, str]:
    """The plain lines of the end, by what stands before the colon."""
    found = re.findall(r"^(training loss|held-out loss|write with it): (.*)$|^(model written to) (.*)$", said, re.M)
    return {a or c: b or d for a, b, c, d in found}


def run_command(command: str, folder: Path) -> str:
    """What a user's shell makes of a line: mambakit is this checkout's."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    script = tools / "mambakit"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mambakit "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("heldout", [0.0, 0.2])
def test_the_end_of_a_run_in_a_pipe(tmp_path, monkeypatch, capsys, heldout):
    monkeypatch.chdir(tmp_path)
    out = "runs/a b's $HOME [red]x[/] with a name that is longer than any line of a console has ever been wide"
    config_of(tmp_path)
    fields = {
        "train_files": ["text.txt"], "vocab_size": 270, "sequence_length": 16, "hidden_size": 8,
        "num_hidden_layers": 1, "batch_size": 2, "steps": 3, "log_every": 50, "autocast": "float32",
        "validation_fraction": heldout,
    }  # fmt: skip
    (tmp_path / "c.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in fields.items()))
    assert cli.main(["train", "c.toml", f"out={out}"]) == 0
    said = lines(capsys.readouterr().out)
    summary = json.loads((tmp_path / out / "summary.json").read_text())
    records = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
    assert said["training loss"] == f"{records[-1]['loss']:.4f} nats per token (mean of steps 1 to 3)"
    assert said["model written to"] == out
    assert said["write with it"] == summary["generate"]
    assert summary["training_loss"] == pytest.approx(records[-1]["loss"], abs=1e-4)
    if heldout:
        assert said["held-out loss"].startswith(f"{summary['heldout_loss']:.4f} nats per token, ")
        assert summary["heldout_loss"] == pytest.approx(math.log(summary["heldout_perplexity"]), abs=1e-3)
    else:
        assert said["held-out loss"].startswith("not measured; validation_fraction=0.05")
        assert summary["heldout_loss"] is None
        assert "dark and stormy" in run_command(said["write with it"], tmp_path)


@pytest.mark.parametrize("prompt", ["-x", "", "it's", 'a "b" $c `d` \\e!', "\u4e2d\nx", "[a] [/b]"])
@pytest.mark.parametrize("tokenizer", ["bytes", "nucleotides"])
def test_the_command_is_what_the_shell_and_the_parser_read(tmp_path, prompt, tokenizer):
    import shlex

    config = TrainConfig(sample_prompt=prompt, out="-o [x]")
    command = generate_command(config, make_vocabulary(tokenizer))
    output = io.StringIO()
    say(Console(file=output, width=20), command)
    arguments = shlex.split(output.getvalue())
    parsed = cli._parser().parse_args(arguments[1:])
    assert arguments[0] == "mambakit"
    assert parsed.model == "./-o [x]"
    text = " ".join(parsed.prompts)
    assert text == ("ACGTACGT" if tokenizer == "nucleotides" else prompt or "Once upon a time")


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_sample_prompt(tmp_path, prompt):
    config = config_of(tmp_path, tokenizer="", vocab_size=270, sample_prompt=prompt)
    assert "write with it" in train(config)


@pytest.mark.parametrize(("steps", "log_every"), [(3, 50), (1, 1), (9, 4)])
@pytest.mark.parametrize("tokenizer", ["", "bytes"])
def test_a_short_run_whose_loss_is_no_number_says_so(tmp_path, steps, log_every, tokenizer):
    config = config_of(
        tmp_path, steps=steps, log_every=log_every, tokenizer=tokenizer, vocab_size=270, learning_rate=1e30, clip=1e30,
        warmup=0.0, checkpoint_every=0,
    )  # fmt: skip
    with pytest.raises(
        FloatingPointError, match=rf"loss is (nan|inf) at step {steps} .*no model is written.*no checkpoint"
    ):
        train(config)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_weights_that_are_no_numbers_make_no_checkpoint(tmp_path, monkeypatch):
    """The latest update was made, and left weights that are not finite: the checkpoint before stays the latest."""
    original = TrainingStep.run

    def poisoned(self, rows, begins):
        result = original(self, rows, begins)
        if (count := getattr(self, "count", 0) + 1) == 4:
            self.model.backbone.norm_f.weight.data.fill_(float("nan"))
        self.count = count
        return result

    monkeypatch.setattr(TrainingStep, "run", poisoned)
    output = io.StringIO()
    with pytest.raises(FloatingPointError, match="latest checkpoint is of step 2: resume=true export_only=true"):
        loop.train(config_of(tmp_path), Console(file=output, width=500))
    assert "step 4: no checkpoint, since the weights are not finite" in output.getvalue()
    monkeypatch.undo()
    assert "model written to" in train(config_of(tmp_path, resume=True, export_only=True))


def test_a_last_update_that_was_skipped_is_no_error(tmp_path, monkeypatch):
    original, calls = TrainingStep.run, []

    def once(self, rows, begins):
        calls.append(1)
        weight = self.model.backbone.norm_f.weight
        kept = weight.detach().clone()
        if len(calls) == 5:
            weight.data.fill_(float("nan"))
        result = original(self, rows, begins)
        if len(calls) == 5:
            weight.data.copy_(kept)
        return result

    monkeypatch.setattr(TrainingStep, "run", once)
    said = lines(train(config_of(tmp_path, log_every=1)))
    assert said["training loss"].endswith("(step 4)"), "the last loss that is a number"


def test_there_is_no_model_before_the_first_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(loop.RunInterrupted, match="stopped at step 1"):
            train(config_of(tmp_path))
    with pytest.raises(ValueError, match="had not reached its first checkpoint; continue its training"):
        train(config_of(tmp_path, resume=True, export_only=True))


def test_nothing_left_to_do(tmp_path):
    first = lines(train(config_of(tmp_path)))
    said = train(config_of(tmp_path, resume=True))
    assert "step 5: nothing left to train" in said
    assert lines(said) == first
    assert lines(train(config_of(tmp_path, resume=True, steps=3)))["training loss"] == first["training loss"]


def test_the_clock_ends_a_run_between_two_records(tmp_path):
    said = lines(train(config_of(tmp_path, steps=0, max_minutes=0.005, log_every=10**6)))
    assert re.fullmatch(r"\d\.\d{4} nats per token \((mean of steps 1 to \d+|step 1)\)", said["training loss"])


def interrupt_at(monkeypatch, number: int) -> None:
    original, calls = TrainingStep.run, []

    def run(self, rows, begins):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(self, rows, begins)

    monkeypatch.setattr(TrainingStep, "run", run)


@pytest.mark.parametrize(
    ("number", "where"),
    [(2, "stopped at step 1, before the first checkpoint: resume=true starts from the beginning"),
     (4, "stopped at step 3: resume=true continues from the checkpoint of step 2")],
)  # fmt: skip
def test_an_interrupted_run_says_how_it_goes_on(tmp_path, monkeypatch, capsys, number, where):
    monkeypatch.chdir(tmp_path)
    fields = {k: v for k, v in vars(config_of(tmp_path)).items() if k in (
        "train_files", "tokenizer", "sequence_length", "hidden_size", "num_hidden_layers", "batch_size", "steps",
        "checkpoint_every",
    )}  # fmt: skip
    (tmp_path / "c.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in fields.items()))
    with monkeypatch.context() as patch:
        interrupt_at(patch, number)
        assert cli.main(["train", "c.toml", "out=my run", "overwrite=true"]) == 130
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [where, "continue with it: mambakit train c.toml 'out=my run' resume=true"]
    import shlex

    assert cli.main(shlex.split(told[1].removeprefix("continue with it: mambakit "))) == 0
    assert "training loss" in lines(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["train", "c.toml", "out=my run", "overwrite=true"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped before the first step: nothing in my run has changed"


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    from tests.training.test_resume import start

    process = start(config_of(tmp_path, steps=10**6, log_every=10**5), tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step-????????/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "continuing from step" in train(
        config_of(tmp_path, steps=10**6, log_every=10**5, resume=True, export_only=True)
    )


# -- held out ----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_single_document_is_held_out():
    document = np.arange(101, dtype=np.uint8)
    train_part, held = TokenStore.from_arrays([document]).split(0.1, 0)
    assert train_part.read(0).tolist() == list(range(90))
    assert held.read(0).tolist() == list(range(90, 101))
    assert (int(train_part.characters[0]), int(held.characters[0])) == (90, 10)
    assert (train_part.tokens, held.tokens, len(train_part), len(held)) == (90, 11, 1, 1)
    assert train_part.fingerprint != held.fingerprint
    again = TokenStore.from_arrays([document]).split(0.1, 5)
    assert again[0].fingerprint == train_part.fingerprint
    for fraction in (0.001, 0.999):
        with pytest.raises(ValueError, match="of one document of 100 tokens holds out"):
            TokenStore.from_arrays([document]).split(fraction, 0)


@pytest.mark.parametrize("fields", [
    {"tokenizer": "", "vocab_size": 270}, {"tokenizer": "bytes"}, {"stateful": True}, {"respect_documents": True},
])  # fmt: skip
def test_a_run_of_one_document_measures_what_it_did_not_see(tmp_path, fields):
    (tmp_path / "text.txt").write_text("\u00e9t\u00e9 a b c d e f g\n" * 60, encoding="utf-8")
    config = config_of(tmp_path, validation_fraction=0.1, **fields)
    assert lines(train(config))["held-out loss"].startswith(tuple("0123456789"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    every = len((tmp_path / "text.txt").read_text(encoding="utf-8"))
    unit = "byte" if config.tokenizer == "bytes" else "character"
    if unit == "character":
        assert 0.05 * every < summary["heldout_characters"] < 0.15 * every
    assert "continuing" in train(config_of(tmp_path, validation_fraction=0.1, resume=True, **fields))


def ends(folder: str) -> str:
    torch.set_num_threads(1)
    training_run.write_curve = lambda *_: None
    output = io.StringIO()
    loop.train(config_of(Path(folder), parallel="ddp"), Console(file=output, width=500))
    return output.getvalue()


def test_the_first_of_several_processes_speaks(tmp_path):
    config_of(tmp_path)
    first, other = launch(ends, 2, str(tmp_path))
    assert lines(first).keys() == {"training loss", "held-out loss", "model written to", "write with it"}
    assert other == ""
