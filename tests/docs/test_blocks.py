"""Every Python block of every page runs, one after another in one namespace, as a reader would type them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from benchmarks.record import ROOT
from benchmarks.render import documents
from tests.docs.worlds import make_hub, world

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    path.relative_to(ROOT).as_posix(): BLOCK.findall(path.read_text(encoding="utf-8"))
    for path in [*documents(), ROOT / "CONTRIBUTING.md"]
}
# Their examples ask a server: test_serving_api.py, test_states.py.
SERVED = ("docs/guides/serving-api.md", "docs/guides/states.md")
PAGES = {name: blocks for name, blocks in PAGES.items() if blocks and name not in SERVED}
# They change the import system of their process.
OWN_PROCESS = ("docs/guides/dropin.md", "docs/guides/migration-mamba-ssm.md", "docs/migration/transformers.md")
# Packages that tests do not install, or that a bare environment lacks: blocks that import them are left out without.
OPTIONAL = ("jax", "sentence_transformers", "onnxruntime", "peft", "llguidance")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("page", sorted(PAGES))
@pytest.mark.filterwarnings("ignore")
def test_blocks_run(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page in OWN_PROCESS:
        done = subprocess.run([sys.executable, "-c", "\n".join(PAGES[page])], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    try:
        names = world(page, hub.parent / "tiny")
        for number, block in enumerate(PAGES[page]):
            missing = [
                name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", block, re.M) and _lacks(name)
            ]
            if missing:
                continue
            code = compile(block if torch.cuda.is_available() else block.replace('"cuda"', '"cpu"'), page, "exec")
            try:
                exec(code, names)
            except Exception as error:
                raise AssertionError(f"block {number} of {page}:\n{block}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _lacks(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is None


def test_there_are_blocks():
    assert len(PAGES) > 20
    assert {"docs/quickstart.md", "docs/guides/generation.md", "README.md"} <= PAGES.keys()


def test_no_block_has_a_language_that_nothing_checks():
    """sh is parsed (test_links.py), Python runs here; text without a language is output."""
    for path in documents():
        found = set(re.findall(r"^```([\w+-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert found <= {"python", "sh", "cpp", "toml"}, f"{path.name}: {found}"
