"""Documents hold what `benchmarks/render.py` renders from the records, and no table of figures written by hand."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import render, tables
from benchmarks.record import FOLDER, ROOT
from benchmarks.tables.decoders import SERVES

DOCUMENTS = render.documents()
# A cell that is a measured figure and nothing else: 0.338, 74 %, 2.59x, **1.2**.
FIGURE = re.compile(r"\**\d[\d,]*(\.\d+x?|(\.\d+)? ?%|x)\**")


def names(path):
    return [match["name"] for match in render.BLOCK.finditer(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_what_the_records_say(path):
    text = path.read_text(encoding="utf-8")
    assert text == render.rendered(path), "run python benchmarks/render.py"
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(names(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_table_of_figures_is_written_by_hand(path):
    for line in render.BLOCK.sub("", path.read_text(encoding="utf-8")).splitlines():
        if line.startswith("|"):
            figures = [cell for cell in line.strip("|").split("|") if FIGURE.fullmatch(cell.strip())]
            assert len(figures) < 2, f"keep a record in docs/benchmarks and render it: {line}"


def test_the_figures_that_it_looks_for():
    for text in ("0.338", "74 %", "74.5 %", "2.59x", "**1,234.5**", "12x"):
        assert FIGURE.fullmatch(text), text
    for text in ("1,000", "431", "8.5, 4.5", "2, 4", "1e-5", "16 x 2048"):
        assert not FIGURE.fullmatch(text), text


def test_every_table_and_record_is_shown():
    """What nobody sees goes out of date."""
    shown = {name for path in DOCUMENTS for name in names(path)}
    assert shown >= tables.TABLES.keys()
    records = tables.Records()
    for name in shown:
        tables.table(name, records)
    kept = {path.stem for path in FOLDER.glob("*.json")} - {"goals"}
    linked = {stem for path in DOCUMENTS for stem in re.findall(r"([\w-]+)\.json\)", path.read_text(encoding="utf-8"))}
    assert kept == set(records.used) | (linked & kept), "a record is shown in a table or linked"


def test_a_change_of_a_record_shows(monkeypatch):
    load = tables.Records.load

    def changed(self, name):
        found = load(self, name)
        for row in found.get("results", {}).get("train_step", []):
            row["tokens_per_second"] += 1
        return found

    monkeypatch.setattr(tables.Records, "load", changed)
    stale = [path for path in DOCUMENTS if path.read_text(encoding="utf-8") != render.rendered(path)]
    assert ROOT / "README.md" in stale
    assert FOLDER / "README.md" in stale


def test_an_unknown_table_is_refused_by_name():
    with pytest.raises(KeyError, match="there is no table speed"):
        tables.table("speed", tables.Records())


def test_the_limits_of_the_decoders():
    """The numbers in the table of decoders are the code's."""
    pytest.importorskip("triton")
    from mambakit.ops.decode import cuda_persistent, triton_few_rows, triton_many_rows, triton_packed_rows

    assert f"up to {cuda_persistent.MOST_ROWS} slots" in SERVES["persistent kernel (CUDA)"]
    assert f"up to {triton_few_rows.MOST_ROWS} slots" in SERVES["kernels for few rows (Triton)"]
    narrow, half, wide_half = (triton_many_rows.most_rows(width, torch.bfloat16) for width in (768, 2048, 2560))
    single, wide_single = (triton_many_rows.most_rows(width, torch.float32) for width in (2048, 2560))
    of = f"of 1.4b {half}, of 2.8b {wide_half}; in float32 {single}, of 2.8b {wide_single}"
    assert f"up to {narrow} slots ({of})" in SERVES["kernels for many rows (Triton)"]
    packed, wide, wide_fp8 = (
        triton_packed_rows.most_rows(w, (bits, 64)) for w, bits in ((768, 8), (2048, 4), (2048, 1))
    )
    assert f"up to {packed} (of 1.4b {wide}, in fp8 {wide_fp8})" in SERVES["kernels for many rows (Triton)"]
