"""The generation benchmark runs to its end: tiny, on a CPU, so that a change of what it calls is noticed here."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.record import ROOT

PARTS = ("prefill", "step", "length", "long", "engine", "draft")  # without the Transformer beside it


def test_every_part_of_ours_runs(tmp_path):
    sizes = "--lengths 7 8 --prompt 32 --new 8 --rows 2 --batches 2 --long-prompt 300 --rounds 2 --draft-tokens 2"
    command = [sys.executable, "benchmarks/generation.py", "--device", "cpu", "--shapes", "tiny", *sizes.split()]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [*command, "--parts", *PARTS, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())["results"]
    assert all(found[part] for part in PARTS if part in found)
    assert {"engine", "draft"} <= set(found)
    assert found["draft"][0]["accepted"] <= found["draft"][0]["proposed"]
