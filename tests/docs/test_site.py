"""The documentation site: it builds without a warning, links out of docs/ lead to pages, its search needs no server."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from benchmarks.record import ROOT

pytest.importorskip("mkdocs")
spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def test_links_out_of_the_folder():
    found = hooks.outside("guides/dna.md", "../../examples/14_masked_dna.py")
    assert hooks.page_of(found) == "repository/examples/14_masked_dna.py.md"
    assert hooks.page_of(hooks.outside("index.md", "../CONTRIBUTING.md")) == "repository/CONTRIBUTING.md"
    assert hooks.outside("guides/dna.md", "tasks.md") is None
    assert hooks.outside("guides/dna.md", "../../missing.py") is None
    assert hooks.outside("guides/dna.md", "../../../elsewhere.py") is None
    assert hooks.outside("guides/dna.md", "https://arxiv.org/abs/2312.00752") is None


@pytest.mark.slow
def test_it_builds(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    dna = (site / "guides" / "dna.html").read_text(encoding="utf-8")
    assert 'href="../repository/examples/14_masked_dna.py.html"' in dna
    assert "BiMambaForMaskedLM" in (site / "repository" / "examples" / "14_masked_dna.py.html").read_text(
        encoding="utf-8"
    )
    # Without a server: the index of the search is a script, and nothing is fetched from elsewhere.
    assert (site / "search" / "search_index.js").is_file()
    fetched = re.findall(r'<(?:script|link)[^>]+(?:src|href)="(https?://[^"]+)"', dna)
    assert fetched == []
    ops = (site / "reference" / "ops.html").read_text(encoding="utf-8")
    assert 'id="mambakit.ops.selective_scan.api.selective_scan"' in ops
    assert "(b, l, d)" in ops
