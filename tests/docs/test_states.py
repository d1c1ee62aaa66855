"""The examples of the guide of states run, and its table has every option."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from benchmarks.record import ROOT
from mambakit.commands.serve import _STATES
from tests.serving.conftest import Server, serving

GUIDE = (ROOT / "docs" / "guides" / "states.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("states")
    with serving(folder / "log", "--states", str(folder / "states"), "--prefix-cache") as server:
        yield server.ready()


def test_python(states):
    names: dict[str, object] = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in blocks("python"):
            exec(compile(block.replace("http://127.0.0.1:8000", states.url), "states.md", "exec"), names)
    lines = shown.getvalue()
    assert "It was a dark and stormy night" in lines
    assert re.search(r"^True \d+$", lines, re.MULTILINE), "the imported file is the exported state"
    surprise = [float(line.split()[0]) for line in lines.splitlines() if re.match(r"-\d", line)]
    assert surprise[1] > surprise[0], "what is repeated is less of a surprise"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_curl(states):
    address = states.url.removeprefix("http://")
    for block in blocks("sh"):
        script = block.replace("localhost:8000", address).replace("curl ", "curl --fail-with-body ")
        done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"object":"list"' in done.stdout


def test_every_option_is_in_the_table():
    for option in _STATES:
        assert f"| `{option.name}` |" in GUIDE
