"""Keeping the best weights, ending early, and trackers."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import mambakit.training.run as training_run
from mambakit.errors import CheckpointError, UsageError
from mambakit.training.best import Best
from mambakit.training.config import TrainConfig
from mambakit.training.config_file import make_config
from mambakit.training.distributed import ProcessMesh
from mambakit.training.loop import train
from mambakit.training.trackers import check_trackers

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = Console(quiet=True)
MESH = ProcessMesh("none", torch.device("cpu"))


def config_of(folder: Path, **fields) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"the {n} fox saw {n * 7 % 31} hens and ate none of them.\n" for n in range(400)))
    values = {
        "train_files": [str(text)], "tokenizer": "bytes", "validation_fraction": 0.1, "sequence_length": 32,
        "batch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "steps": 12, "log_every": 1, "eval_every": 2,
        "checkpoint_every": 4, "autocast": "float32", "export_dtype": "float32", "out": str(folder / "run"),
        "keep_best": True,
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def script(monkeypatch, losses: dict[int, float]):
    """Held-out losses by step, in place of measured ones; also collects the weights at each."""
    weights = {}

    def measured(plain, *_):
        run = measured.run
        weights[run.step] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        return losses[run.step]

    plain = training_run.Run.go

    def go(self):
        measured.run = self
        return plain(self)

    monkeypatch.setattr(training_run, "sample_loss", measured)
    monkeypatch.setattr(training_run.Run, "go", go)
    return weights


def heard(config: TrainConfig) -> tuple[dict, str]:
    said = io.StringIO()
    summary = train(config, Console(file=said, width=300), QUIET)
    return summary, said.getvalue()


def test_the_best_weights_are_written(tmp_path, monkeypatch):
    weights = script(monkeypatch, {2: 5.0, 4: 3.0, 6: 2.0, 8: 4.0, 10: 2.5, 12: 2.0})
    summary, said = heard(config_of(tmp_path))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in weights[6].items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)
    assert not torch.equal(weights[12]["backbone.embeddings.weight"], saved["backbone.embeddings.weight"])
    assert summary["weights_of_step"] == 6
    assert "the weights of step 6 are written: held-out loss 2.0000" in said
    assert "the weights are those of step 6" in (tmp_path / "run" / "README.md").read_text()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("best-*")] == ["best-00000006.safetensors"]


def test_the_last_weights_are_looked_at_too(tmp_path, monkeypatch):
    script(monkeypatch, {5: 3.0, 7: 2.0})
    summary, _ = heard(config_of(tmp_path, steps=7, eval_every=5))
    assert summary["weights_of_step"] == 7


def test_a_run_ends_early(tmp_path, monkeypatch):
    script(monkeypatch, {2: 3.0, 4: 2.0, 6: 2.1, 8: 2.2, 10: 1.0})
    summary, said = heard(config_of(tmp_path, early_stopping_patience=2))
    assert summary["steps"] == 8
    assert summary["weights_of_step"] == 4
    assert "step 8: no lower held-out loss in 2 evaluations: the run ends early" in said
    # More patience: it goes on, and finds the better ones.
    script(monkeypatch, {10: 1.0, 12: 1.5})
    summary, _ = heard(config_of(tmp_path, early_stopping_patience=5, resume=True))
    assert (summary["steps"], summary["weights_of_step"]) == (12, 10)


def test_resuming_goes_back_to_the_best_of_the_checkpoint(tmp_path, monkeypatch):
    """Killed at step 7, with weights of step 6 on the disk and a checkpoint of step 4: the end is the same."""
    losses = {2: 3.0, 4: 4.0, 6: 2.0, 8: 2.5, 10: 2.6, 12: 2.7}
    weights = script(monkeypatch, losses)
    whole, _ = heard(config_of(tmp_path, out=str(tmp_path / "whole")))
    monkeypatch.undo()

    script(monkeypatch, losses)
    step = training_run.TrainingStep.run

    def killed(self, *rows):
        killed.steps += 1
        if killed.steps == 8:
            raise KeyboardInterrupt
        return step(self, *rows)

    killed.steps = 0
    monkeypatch.setattr(training_run.TrainingStep, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        heard(config_of(tmp_path))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best-00000002.safetensors", "best-00000006.safetensors", "step-00000004"]
    monkeypatch.undo()
    script(monkeypatch, losses)
    summary, _ = heard(config_of(tmp_path, resume=True))
    assert summary["weights_of_step"] == whole["weights_of_step"] == 6
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in weights[6].items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)


def test_lost_weights(tmp_path):
    model = torch.nn.Linear(2, 2)
    best = Best(tmp_path, "r", keep=True)
    assert best.look(1.0, 4, model, MESH)
    state = best.state_dict()
    (tmp_path / "best-00000004.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="keep_best=false"):
        best.restore(model)
    (tmp_path / "best-00000004.safetensors").unlink()
    again = Best(tmp_path, "r", keep=True)
    assert "step 4, the best so far, are gone" in again.load_state_dict(state)
    assert again.look(7.0, 8, model, MESH)
    again.checkpointed()
    assert [p.name for p in tmp_path.iterdir()] == ["best-00000008.safetensors"]


def test_overwriting_removes_them(tmp_path, monkeypatch):
    script(monkeypatch, dict.fromkeys(range(2, 13, 2), 1.0))
    heard(config_of(tmp_path))
    foreign = tmp_path / "run" / "checkpoints" / "best-00000099.safetensors"
    foreign.write_bytes(b"mine")
    heard(config_of(tmp_path, overwrite=True, keep_best=False))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("best-*")] == [foreign.name]


@pytest.mark.parametrize("field", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_they_need_held_out_text(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} compares held-out losses; set validation_fraction"):
        TrainConfig(**field)


def test_adapters_alone_are_kept(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    Best(tmp_path, "r", keep=True).look(1.0, 1, model, MESH)
    assert set(load_file(tmp_path / "best-00000001.safetensors")) == {"1.weight", "1.bias"}


# -- trackers ----------------------------------------------------------------------------------------------------------


def test_refused_trackers(monkeypatch):
    with pytest.raises(ValueError, match=r"report_to names 'mlflow'; choose among tensorboard, wandb, trackio"):
        TrainConfig(report_to=["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ValueError, match="wandb twice"):
        check_trackers(["wandb", "wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trackio, which is not installed: pip install trackio"):
        check_trackers(["trackio"])
    with pytest.raises(UsageError, match="tensorboard is now report_to=tensorboard"):
        make_config({"tensorboard": True}, "x.toml")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_trackers_are_given(tmp_path, monkeypatch, name):
    """Every record goes to them with its step; their packages are played here."""
    logged, calls = {}, []
    module = types.ModuleType(name)
    module.log = lambda metrics, step: logged.__setitem__(step, metrics)
    module.finish = lambda: calls.append("finish")
    module.Settings = lambda **_: None
    module.init = lambda **fields: (calls.append(fields), module)[1]
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, name, module)
    train(config_of(tmp_path, report_to=[name], keep_best=False, project="hens"), QUIET)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(logged) == [r["step"] for r in records]
    assert logged[12]["loss"] == records[-1]["loss"]
    assert "heldout_loss" in logged[12]
    assert (calls[0]["project"], calls[0]["config"]["hidden_size"]) == ("hens", 16)
    assert calls[-1] == "finish"


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config_of(tmp_path, report_to=["wandb"], keep_best=False), QUIET)
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_trackio_itself(tmp_path):
    """In a process of its own: trackio reads the folder of its runs when it is imported."""
    pytest.importorskip("trackio")
    import os
    import subprocess

    config_of(tmp_path)
    (tmp_path / "c.toml").write_text(
        f'train_files = ["{tmp_path}/text.txt"]\ntokenizer = "bytes"\nsteps = 3\nlog_every = 1\nbatch_size = 2\n'
        f'sequence_length = 16\nhidden_size = 8\nnum_hidden_layers = 1\nout = "{tmp_path}/run"\nautocast = "float32"\n'
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "mambakit", "train", str(tmp_path / "c.toml"), "report_to=trackio"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "trackio").rglob("*.db"))
