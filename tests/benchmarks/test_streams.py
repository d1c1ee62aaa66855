"""The benchmark of streams runs to its end, tiny, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.record import ROOT


def test_it_runs(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--streams", "3", "--tokens", "4", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, "benchmarks/streams.py", "--device", "cpu", "--embedded", *sizes, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["results"]["streams"]
    assert [row["what"] for row in rows] == ["StreamScorer", "packed scoring", "packed prefill"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
