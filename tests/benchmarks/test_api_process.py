"""The benchmark of the API process runs to its end, tiny."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.record import ROOT

pytest.importorskip("uvicorn")


def test_it_runs(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--replicas", "1", "--slots", "2", "--look-ms", "1", "--new-tokens", "16", "--requests", "2"]
    command = [
        sys.executable,
        "benchmarks/api_process.py",
        *sizes,
        "--rounds",
        "1",
        "--seconds",
        "0.3",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["results"]["api-process"]
    assert [row["answers"] for row in rows] == ["streamed", "whole"]
    assert all(row["requests"] == 4 and row["pieces"] >= row["messages"] >= 4 for row in rows)
    assert all(0 < row["piece_us"] < row["text_us"] for row in rows)
