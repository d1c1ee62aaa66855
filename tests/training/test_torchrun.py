"""Launched by torchrun: `mambakit train`, and transformers' Trainer and accelerate without a change."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mambakit
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
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.training.under_torchrun", str(tmp_path), str(port),
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


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_nccl_on_one_gpu(tmp_path, mode):
    """A group of one: what one GPU can say of NCCL, of FSDP's kernels and of sharded checkpoints on a GPU."""
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "text.txt").write_text("All happy families are alike.\n" * 60)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    curves, uncaptured = [], []
    for how in ("none", mode):
        start = launcher if how != "none" else [sys.executable]
        out = tmp_path / how
        command = [*start, "-m", "mambakit", "train", str(tmp_path / "config.toml"), f"parallel={how}", f"out={out}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        uncaptured.append("1 process, ddp; the step runs without a CUDA graph" in done.stderr)
        curves.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert uncaptured == [False, mode == "ddp"]  # FSDP of one process is captured
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)  # bfloat16 products
