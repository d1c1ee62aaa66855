"""Every benchmark can be imported: what it takes of the package and of other benchmarks is there."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.record import ROOT

_IMPORT_ALL = """
import importlib, pathlib
for path in sorted(pathlib.Path("benchmarks").glob("*.py")):
    importlib.import_module("benchmarks." + path.stem)
    print(path.stem)
"""


def test_every_benchmark_can_be_imported():
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    assert len(done.stdout.split()) == len(list((ROOT / "benchmarks").glob("*.py")))
