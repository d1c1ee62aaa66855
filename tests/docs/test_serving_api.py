"""The examples of the API's guide run, and its tables have every field that is served."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess

import pytest

from benchmarks.record import ROOT
from mambakit.serving.api.chat import CHAT
from mambakit.serving.api.chat_messages import MESSAGE
from mambakit.serving.api.completions import COMPLETIONS
from mambakit.serving.api.score import SCORE
from tests.serving.conftest import chat_model, chat_server  # noqa: F401, fixtures

GUIDE = (ROOT / "docs" / "guides" / "serving-api.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def test_python(chat_server):  # noqa: F811
    names: dict[str, object] = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in blocks("python"):
            exec(compile(block.replace("http://127.0.0.1:8000", chat_server.url), "serving-api.md", "exec"), names)
    assert re.search(r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]", shown.getvalue())
    assert re.search(r'\{"sky": "(blue|grey)"\}', shown.getvalue())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_curl(chat_server):  # noqa: F811
    address = chat_server.url.removeprefix("http://")
    answers = []
    for block in blocks("sh"):
        script = block.replace("localhost:8000", address).replace("curl ", "curl --fail-with-body ")
        done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        answers.append(done.stdout)
    stream, models, score, tokens = answers
    assert stream.startswith("data: {")
    assert stream.rstrip().endswith("data: [DONE]")
    assert "x-request-id: my-id-7" in models.lower()
    assert '"log_prob":' in score
    assert '"token_strs":' in tokens


def test_every_field_is_in_the_tables():
    rows = re.findall(r"^\| (`[^|]*) \|([^|]*)\|", GUIDE, re.MULTILINE)
    named = {name.split(".")[0] for row in rows for name in re.findall(r"`([\w.]+)`", "|".join(row))}
    for fields in (COMPLETIONS, CHAT, MESSAGE, SCORE):
        assert {name for name, field in fields.items() if field.served} <= named
