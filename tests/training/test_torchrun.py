"""Launched by torchrun: `mambakit train`, and transformers' Trainer and accelerate without a change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mambakit
from mambakit.training.checkpoint import checkpoints
from tests.models.configurations import worst
from tests.training.under_torchrun import gradient, run_trainer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
train_files = ["{folder}/text.txt"]
vocab_size = 270
sequence_length = 16
hidden_size = 16
num_hidden_layers = 2
batch_size = 4
steps = 4
log_every = 1
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "text.txt").write_text("All happy families are alike.\n" * 60)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.training.under_torchrun", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr

    assert done.stderr.count("2 processes, fsdp") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "run")

    found = load_file(tmp_path / "weights.safetensors")
    torch.manual_seed(5)
    assert worst(found.pop("gradient"), gradient(torch.randint(1, 61, (4, 11)))) < 1e-5
    for name, expected in run_trainer(tmp_path, 4).items():
        assert worst(found[name], expected) < 1e-5, name


def nccl(folder: Path, how: str, gpus: int, out: str, *fields: str) -> list[float]:
    """The losses of a run on so many GPUs; its steps, exchanges and all, are CUDA graphs."""
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    (folder / "text.txt").write_text("All happy families are alike.\n" * 60)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if how != "none" else []
    command = [sys.executable, *launcher, "-m", "mambakit", "train", str(folder / "config.toml"), f"parallel={how}"]
    command += [f"out={folder / out}", *fields]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "without a CUDA graph" not in done.stderr
    return [json.loads(line)["loss"] for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_nccl_on_one_gpu(tmp_path, mode):
    """A group of one: what one GPU can say of NCCL, of FSDP's kernels and of sharded checkpoints on a GPU."""
    alone, mesh = (nccl(tmp_path, how, 1, how) for how in ("none", mode))
    assert mesh == pytest.approx(alone, rel=1e-2)  # bfloat16 products


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_nccl_on_two_gpus(tmp_path, mode):
    """The curve of one GPU; and a run that lost all after its second step goes on to the last bit."""
    alone = nccl(tmp_path, "none", 1, "alone", "steps=6")
    whole = nccl(tmp_path, mode, 2, "whole", "steps=6", "checkpoint_every=2", "keep_checkpoints=9")
    assert whole == pytest.approx(alone, rel=1e-2)  # bfloat16 products
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in checkpoints(tmp_path / "cut" / "checkpoints")[1:]:
        shutil.rmtree(later)
    assert nccl(tmp_path, mode, 2, "cut", "steps=6", "checkpoint_every=2", "resume=true") == whole
    weights, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
