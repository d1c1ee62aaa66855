"""The soak runs to its end, tiny; what goes wrong is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from itertools import repeat
from types import SimpleNamespace

import pytest

from benchmarks.record import ROOT
from benchmarks.soak import Case, Found, Phase, Stream, missed
from tests.models.tiny import save_tiny

EVENT = b'data: {"choices":[{"text":"%s"}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_it_runs(tmp_path):
    save_tiny(tmp_path / "model", eos_token_id=303)
    out = tmp_path / "out.json"
    sizes = ["--streams", "20", "--few", "3", "--few-seconds", "1", "--minutes", "0.03", "--prompts", "3"]
    sizes += ["--new-tokens", "12", "--prompt-words", "3", "--model", str(tmp_path / "model"), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", *sizes], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert out.is_file(), done.stderr[-2000:]  # on a busy machine goals of speed may be missed
    rows = json.loads(out.read_text())["results"]["soak"]
    assert [row["streams"] for row in rows] == [3, 20]
    assert all(row["lost"] == row["wrong"] == 0 and row["texts"] >= row["streams"] for row in rows), done.stdout
    assert all(row["tokens_per_second"] > 0 for row in rows)


class Transport:
    """Of a server that answers with these bytes."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, _data: bytes) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("received", "lost", "wrong", "texts"),
    [
        ([HEAD + EVENT % b"a", EVENT % b"b", b"data: [DONE]\n\n\r\n0\r\n\r\n"], 0, 0, 1),
        ([HEAD + EVENT % b"a", EVENT % b"x", b"data: [DONE]\n\n\r\n0\r\n\r\n"], 0, 1, 1),
        ([HEAD + EVENT % b"a", None], 1, 0, 0),
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", b"0\r\n\r\n"], 1, 0, 0),
    ],
)
def test_a_stream_notes_what_came(received, lost, wrong, texts):
    found, transport = Found(), Transport()
    stream = Stream(repeat(Case(b"", "ab")), found, Phase(measuring=True))
    stream.connection_made(transport)
    for data in received:
        if data is None:
            stream.connection_lost(None)
        else:
            stream.data_received(data)
    assert (len(found.lost), len(found.wrong), found.texts) == (lost, wrong, texts)
    assert transport.closed == (lost == 1 and None not in received)


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    async def stopped(_seconds: float) -> None: ...

    phase, now = Phase(), iter([0.0, 500.0])
    monkeypatch.setattr("benchmarks.soak.time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr("benchmarks.soak.asyncio", SimpleNamespace(sleep=stopped))
    asyncio.run(phase.sleep(0.5))
    assert phase.ran == 1.0


def test_goals_that_were_missed_are_named():
    few = {"streams": 16, "tokens_per_second": 100.0, "lost": 0, "wrong": 0}
    good = {"streams": 9, "tokens_per_second": 95.0, "lost": 0, "wrong": 0, "growth_mb": 3, "gap_p50": 1, "gap_p99": 2}
    assert missed(few, good) == []
    bad = {"streams": 9, "tokens_per_second": 50.0, "lost": 1, "wrong": 2, "growth_mb": 70, "gap_p50": 1, "gap_p99": 4}
    assert len(missed(few, bad)) == 5
