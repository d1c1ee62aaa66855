"""A run that is killed at any moment resumes to the same losses and weights, and its folder records it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mambakit
from mambakit.training.checkpoint import checkpoints
from mambakit.training.config import TrainConfig
from mambakit.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
LETTERS = "".join(random.Random(0).choices("ACGTN", k=9000))


def config_of(folder: Path, **fields) -> TrainConfig:
    """Everything with a state: carried states, parts of a batch, strands, masked letters, odd intervals."""
    (folder / "g.fa").write_text(f">a\n{LETTERS[:4000]}\n>b\n{LETTERS[4000:]}\n")
    values = {
        "train_files": [str(folder / "g.fa")], "validation_fraction": 0.4, "seed": 3, "reverse_complement": True,
        "stateful": True, "fresh_rows": 0.3, "respect_documents": True, "sequence_length": 24, "batch_size": 4,
        "accumulate": 2, "hidden_size": 16, "num_hidden_layers": 2, "steps": 60, "learning_rate": 1e-2, "log_every": 3,
        "eval_every": 30, "checkpoint_every": 4, "spike_factor": 50.0, "autocast": "float32",
        "out": str(folder / "run"),
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def losses(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["gradient_norm"], r.get("heldout_loss")) for r in records]


def start(config: TrainConfig, folder: Path) -> subprocess.Popen:
    path = folder / "config.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in dataclasses.asdict(config).items()]
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mambakit", "train", str(path)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def kill_at_random(process: subprocess.Popen, metrics: Path, after: int) -> None:
    """Wait until there are ``after`` records, then a random moment, then kill -9."""
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= after):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_runs_continue_identically(tmp_path):
    whole = config_of(tmp_path, out=str(tmp_path / "whole"))
    train(whole, QUIET)
    out = tmp_path / "run"
    config = config_of(tmp_path)
    kill_at_random(start(config, tmp_path), out / "metrics.jsonl", 2)
    config.resume = True
    before = len((out / "metrics.jsonl").read_text().splitlines())
    kill_at_random(start(config, tmp_path), out / "metrics.jsonl", min(before + 3, 18))
    train(config, QUIET)
    assert losses(out) == losses(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not list(out.rglob("*.tmp"))


def test_the_folder_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, steps=15, report_to=["tensorboard"], checkpoint_every=5, keep_checkpoints=2)
    summary = train(config, QUIET)
    out = tmp_path / "run"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "train_config.json", "environment.json", "metrics.jsonl", "loss.png", "checkpoints", "tensorboard", "tokens",
        "model.safetensors", "config.json", "tokenizer.json", "README.md", "summary.json",
    }  # fmt: skip
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-00000010", "step-00000015"]
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["device"]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [3, 6, 9, 12, 15]
    assert json.loads((out / "train_config.json").read_text())["seed"] == 3
    assert 1.5 < summary["heldout_bits_per_nucleotide"] < 3.5
    assert summary["sample"] is None
    card = (out / "README.md").read_text()
    assert f"held-out bits per nucleotide | {summary['heldout_bits_per_nucleotide']:.3f}" in card
    assert "A, C, G, T and N" in card


def test_the_model_of_a_checkpoint_is_exported(tmp_path):
    config = config_of(tmp_path, steps=9, checkpoint_every=4, keep_checkpoints=9, export_dtype="float32")
    train(config, QUIET)
    out = tmp_path / "run"
    final = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step-00000009")
    config.resume = config.export_only = True
    assert train(config, QUIET)["steps"] == 8
    saved = torch.load(out / "checkpoints" / "step-00000008" / "state.pt")["model"]
    written = mambakit.AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    assert (out / "model.safetensors").read_bytes() != final


def test_other_documents_are_refused(tmp_path):
    config = config_of(tmp_path, steps=4, validation_fraction=0.0)
    train(config, QUIET)
    (tmp_path / "g.fa").touch()  # the same contents at another time are the same documents
    config.resume = True
    train(config, QUIET)
    (tmp_path / "g.fa").write_text(f">a\n{LETTERS}\n")
    with pytest.raises(ValueError, match="differ from those that the run"):
        train(config, QUIET)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    config = config_of(tmp_path, steps=6)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": ')
    config.resume = True
    train(config, QUIET)
    assert [step for step, *_ in losses(tmp_path / "run")] == [3, 6]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_skipped_update_is_told(tmp_path):
    """One step with an impossible batch: the run says what happened and goes on."""
    from mambakit.training.step import TrainingStep

    original, calls = TrainingStep.run, []

    def sometimes_not_finite(self, rows, begins):
        calls.append(1)
        if len(calls) == 7:
            weight = self.model.backbone.norm_f.weight
            kept = weight.detach().clone()
            weight.data.fill_(float("nan"))
            result = original(self, rows, begins)
            weight.data.copy_(kept)
            return result
        return original(self, rows, begins)

    TrainingStep.run = sometimes_not_finite
    console = Console(record=True, width=200, file=io.StringIO())
    try:
        train(config_of(tmp_path, steps=12, stateful=False, fresh_rows=0.0, checkpoint_every=7), console)
    finally:
        TrainingStep.run = original
    told = console.export_text()
    assert "step 9: 1 of the last updates skipped" in told
    assert "no checkpoint, since the latest update was skipped" in told
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped", 0) for r in records] == [0, 0, 1, 1]
    assert all(r["loss"] is not None for r in records)


@pytest.mark.parametrize("name", ["dna", "audio", "finetune", "documents"])
def test_the_shipped_recipes_load(name):
    from mambakit.training.config_file import load_config

    load_config(ROOT / "configs" / f"{name}.toml", [])
