"""The examples run, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "promise"),
    [
        ("01_generate.py", (), "It was a dark and stormy night"),
        ("02_state.py", (), "from the file: the same"),
        ("03_long_prompt.py", ("--tokens", "2000"), "a prompt of 2,000 tokens"),
        ("04_score.py", (), "bits per character"),
        ("05_prefix_cache.py", (), "second:  767 of 768 tokens known"),
        ("06_speculative.py", (), "a draft model: the same text"),
        ("07_constrained.py", (), "a JSON text: {"),
        ("08_serve.py", (), "both replicas wrote"),
        ("14_masked_dna.py", ("--steps", "30", "--length", "64"), "the other strand's logits differ by 0.0e+00"),
        ("mamba_ssm_vision.py", (), "accuracy on new images: 0.9"),
        ("mamba_ssm_time_series.py", (), "squared error of the forecast: 0.0"),
        ("mamba_ssm_genomics.py", (), "0.0"),
    ],
)
def test_example(name, arguments, promise):
    assert promise in run(name, *arguments)


def test_a_program_for_small_devices(tmp_path):
    pytest.importorskip("executorch")
    assert "logits differ by" in run("15_executorch.py", str(save(tmp_path)), str(tmp_path / "m.pte"))


def save(folder: Path) -> Path:
    from tests.models.tiny import save_tiny

    save_tiny(folder / "tiny")
    return folder / "tiny"


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name
