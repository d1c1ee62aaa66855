"""The generation benchmark runs to its end: tiny, on a CPU, so that a change of what it calls is noticed here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import render, tables
from benchmarks.context import draw
from benchmarks.record import ROOT
from benchmarks.tables import context, records

PARTS = ("prefill", "step", "length", "long", "engine")  # without the Transformer beside it


def test_every_part_of_ours_runs(tmp_path):
    sizes = "--lengths 7 8 --prompt 32 --new 8 --rows 2 --batches 2 --long-prompt 300 --rounds 2"
    command = [sys.executable, "benchmarks/generation.py", "--device", "cpu", "--shapes", "tiny", *sizes.split()]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [*command, "--parts", *PARTS, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())["results"]
    assert all(found[part] for part in PARTS if part in found)
    assert "engine" in found


def test_contexts_are_measured_in_parts_and_rendered(tmp_path):
    """Beside a tiny Llama as it comes; a second call keeps the rows of the first."""
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/generation.py", "--device", "cpu", "--shapes", "tiny", "--parts", "context"]
    command += [
        "--context-shape",
        "tiny",
        "--context-rows",
        "2",
        "--json",
        str(out),
        "--contexts",
        "128+512",
        "2048+128",
    ]
    for contenders in (["mambakit", "Llama"], ["mambakit, states in bfloat16"]):
        done = subprocess.run(
            [*command, "--contenders", *contenders], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["results"]["context"]
    assert len(rows) == 6
    head, lines = context.table(rows)
    assert head == ["tokens/s (rows)", "128 + 512", "2,048 + 128"]
    assert [line[0] for line in lines[:3]] == ["mambakit", "mambakit, states in bfloat16", "Llama"]
    draw(rows, "a CPU", tmp_path / "context.png")
    assert (tmp_path / "context.png").stat().st_size > 5000


def test_the_table_is_rendered_from_a_record(tmp_path, monkeypatch):
    """As `render.py` will, once docs/benchmarks has one: of made-up rates, in a folder of its own."""
    made_up = {"mambakit": 3000.0, "Llama, compiled": 1000.0, "Llama": 500.0}
    rows = [
        {"context": c, "who": who, "batch": 64, "tokens_per_second": rate, "shape": "1.4b"}
        for c in context.CONTEXTS
        for who, rate in made_up.items()
    ]
    content = {"machine": "a GPU", "date": "2026-01-01", "command": "python x.py", "results": {"context": rows}}
    for module in (records, render):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setitem(tables.TABLES, "context", context.context)
    (tmp_path / "2026-01-01-gpu-context.json").write_text(json.dumps(content))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table: context -->\n<!-- end -->\n")
    text = render.rendered(document)
    assert "| tokens/s (rows) | 128 + 512 | 2,048 + 128 | 8,192 + 256 | 32,768 + 256 |" in text
    assert "| mambakit | 3,000 (64) | 3,000 (64) | 3,000 (64) | 3,000 (64) |" in text
    assert "| mambakit against the compiled Llama | 3.0x | 3.0x | 3.0x | 3.0x |" in text
    assert "[a GPU, 2026-01-01](2026-01-01-gpu-context.json): `python x.py`" in text


def test_a_measured_context_is_shown():
    """Its table in the benchmarks' page, its picture in the README."""
    if not records.kept("context"):
        pytest.skip("not measured yet")
    assert "<!-- table: context -->" in (records.FOLDER / "README.md").read_text(encoding="utf-8")
    assert "docs/images/context.png" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_best_batch_and_ratios():
    rates = (
        ("mambakit", 64, 10.0),
        ("mambakit", 128, 30.0),
        ("Llama, compiled", 64, 10.0),
        ("Llama, compiled", 96, None),
    )
    rows = [{"context": "128+512", "who": w, "batch": batch, "tokens_per_second": rate} for w, batch, rate in rates]
    assert context.best(rows, who="mambakit")["batch"] == 128
    assert context.against(rows, "128+512") == {"Llama, compiled": 3.0}
    assert context.table(rows)[1][-1] == ["mambakit against the compiled Llama", "3.0x"]


def test_drafts_are_measured(tmp_path):
    out = tmp_path / "out.json"
    options = (
        "--device cpu --target tiny --draft tiny --new 12 --rows 1 3 --draft-tokens 2 --rounds 1 --acceptance 0 0.7 1 "
        "--phases"
    )
    command = [sys.executable, "benchmarks/drafts.py", *options.split(), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for row in json.loads(out.read_text())["results"]["drafts"] if row["drafter"] != "none"]
    assert len(rows) == 2 * 3 * 3
    assert all(row["kept"] == 0 for row in rows if row["acceptance"] == 0)
    assert all(row["kept"] == 1 for row in rows if row["acceptance"] == 1)
