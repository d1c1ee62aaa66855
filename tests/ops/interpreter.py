"""Triton's kernels on a GPU and, where there is none, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", id="interpreted", marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")],
    ),
]


def run_interpreted(file: str) -> None:
    """The ``interpreted`` tests of a file. The interpreter is chosen when Triton is imported, so it needs a process of
    its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "interpreted", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
