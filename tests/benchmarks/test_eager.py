"""The benchmark of layers that run eagerly runs to its end, tiny, on a CPU, with a package in mamba-ssm's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import eager
from benchmarks.record import ROOT

PEER = {
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/modules/__init__.py": "",
    "mamba_ssm/models/__init__.py": "",
    "mamba_ssm/modules/mamba_simple.py": "from mambakit.compat.mamba import Mamba",
    "mamba_ssm/models/mixer_seq_simple.py": "from mambakit.compat.mixer_model import MixerModel",
    "selective_scan_cuda.py": "",
}


def run(tmp_path, *options: str) -> subprocess.CompletedProcess:
    for name, text in PEER.items():
        file = tmp_path / "peer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "peer"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/eager.py", "--tiny", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def test_it_runs_beside_a_peer(tmp_path):
    out = tmp_path / "out.json"
    done = run(tmp_path, "--paths", "prepared", "drop-in", "mamba-ssm", "--json", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())["results"]
    assert [row["path"] for row in results["mixers"]] == ["prepared", "drop-in", "mamba-ssm"]
    assert [row["path"] for row in results["inference"]] == ["prepared"]
    assert all(row["ms"] > 0 for rows in results.values() for row in rows)
    tables = done.stdout.split("\nmixers: ")[1].splitlines()
    assert tables[1].split()[-6:] == ["mamba-ssm", "/", "prepared", "mamba-ssm", "/", "drop-in"]
    prepared, drop_in, peer = (row["ms"] for row in results["mixers"])
    assert tables[2].split()[-2:] == [f"{peer / prepared:.2f}", f"{peer / drop_in:.2f}"]


def test_compiled_models(tmp_path):
    out = tmp_path / "out.json"
    done = run(tmp_path, "--paths", "prepared", "--parts", "compile", "--json", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["results"]["compile"]
    assert [row["mode"] for row in rows] == ["eager", "default", "reduce-overhead"]
    assert "default/eager" in done.stdout


def test_a_part_ends_at_its_limit(tmp_path, capsys):
    done = run(tmp_path, "--paths", "prepared", "--parts", "mixers", "models", "--limit", "0.001")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mixers: ended after 0.001 s (--limit)" in done.stdout
    with eager.limited("part", 60):
        pass
    with pytest.raises(ZeroDivisionError), eager.limited("part", 60):
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(eager.importlib.util, "find_spec", lambda name: None)
    assert eager.missing("prepared") is None
    assert eager.missing("mamba-ssm") == "mamba_ssm, selective_scan_cuda not installed"
