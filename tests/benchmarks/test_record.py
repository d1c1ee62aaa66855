"""What a run's record holds, and that every benchmark writes one."""

from __future__ import annotations

import datetime
import json
import re
import sys

import pytest

from benchmarks import record
from benchmarks.record import FOLDER, ROOT

FIELDS = {"machine", "date", "commit", "command", "results"}
# What makes records of others, a part of generation.py, and requests that only must not fail.
NO_RUNS = {
    "record.py", "render.py", "context.py", "fuzz_serving.py", "fuzz_engine.py", "crash_serving.py", "kernel_cases.py",
    "eager_layers.py", "eager_profile.py",
}  # fmt: skip
RECORDS = sorted(path for path in FOLDER.glob("*.json") if path.name != "goals.json")


def test_a_run_writes_its_own_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "sampling.py"), "--rows", "1", "--json", "out.json"])
    path = tmp_path / "out.json"
    record.write(
        path, {"sampling": [{"rows": 1, "op": 0.5}, {"rows": 2, "op": None}]}, gpus=0, notes="tested", peer="1.2"
    )
    found = json.loads(path.read_text())
    assert found["command"] == "python benchmarks/sampling.py --rows 1"
    assert found["results"] == {"sampling": [{"rows": 1, "op": 0.5}, {"rows": 2, "op": None}]}
    assert found["software"]["peer"] == "1.2"
    assert found["date"] == datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    assert found.keys() > FIELDS
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    assert '{"rows": 1, "op": 0.5}' in path.read_text(), "a row is a line"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.write(None, {}, gpus=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_records_that_are_kept(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() >= FIELDS
    assert path.name.startswith(found["date"])
    assert datetime.date.fromisoformat(found["date"])
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found["commit"])
    assert path.read_text(encoding="utf-8") == record.text(found), "written as record.py writes"
    for part in found["results"].values():
        assert isinstance(part, (int, float)) or all(isinstance(row, dict) for row in part)


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "benchmarks").glob("*.py") if p.name not in NO_RUNS), ids=lambda path: path.stem
)
def test_every_benchmark_can_write_one(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"\brecords?\.add_argument\(parser\)", text), "--json is declared by benchmarks/record.py"
    assert re.search(r"\brecords?\.write\(", text)
