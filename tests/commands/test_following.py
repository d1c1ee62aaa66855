"""`mambakit score --follow`: lines of growing files, their marks, and going on after a stop or a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mambakit
from mambakit import cli
from mambakit.commands import tail as module
from mambakit.commands.tail import Tail
from mambakit.generation.score import score_text
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
LINES = [f"The cat sat on the mat {i % 7} and slept.\n" for i in range(60)]
ODD = "zqx ~~ 日本語の文字 ## kkk\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


# -- tails -------------------------------------------------------------------------------------------------------------


def test_a_line_counts_once_its_end_is_there(tmp_path):
    log = tmp_path / "log"
    tail = Tail(log)
    assert tail.read(100) == []
    log.write_bytes(b"one\r\ntw")
    assert tail.read(100) == [b"one\r\n"]
    with open(log, "ab") as file:
        file.write(b"o\n\nthree")
    assert tail.read(100) == [b"two\n", b"\n"]
    assert tail.read(100) == []
    assert tail.rest() == [b"three"]
    assert tail.rest() == []


def test_places_survive_a_restart(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"line %d\n" % i for i in range(50)) + b"unfin")
    found, place = [], None
    while True:
        tail = Tail(log, place)
        lines = tail.read(37)
        found, place = found + lines, json.loads(json.dumps(tail.place()))
        assert not tail.anew
        if not lines:
            break
    assert found == [b"line %d\n" % i for i in range(50)]


@pytest.mark.parametrize("how", ["replaced", "cut", "replaced meanwhile", "cut meanwhile"])
def test_rotation(tmp_path, how):
    log = tmp_path / "log"
    log.write_bytes(b"old 1\nold 2\nleft")
    tail = Tail(log)
    assert tail.read(100) == [b"old 1\n", b"old 2\n"]
    place = tail.place()
    if "replaced" in how:
        log.rename(tmp_path / "log.1")
        with open(tmp_path / "log.1", "ab") as file:
            file.write(b" over")
    log.write_bytes(b"new 1\n")
    if "meanwhile" in how:  # of the process
        tail = Tail(log, place)
        assert tail.anew == (how == "cut meanwhile")
    lines = tail.read(100) + tail.read(100) + tail.read(100)
    assert lines == ([b"left over"] if "replaced" in how else []) + [b"new 1\n"]
    assert tail.place()["offset"] == 6


def test_a_file_replaced_while_nobody_followed_is_read_to_its_end(tmp_path):
    """Under any name beside the new one, and as a copy (copytruncate); an older one that begins alike is not taken."""
    log = tmp_path / "log[1]"  # a name is no pattern
    log.write_bytes(b"head\n" + b"".join(b"line %d\n" % i for i in range(20)))
    tail = Tail(log)
    seen = tail.read(1000)
    place = json.loads(json.dumps(tail.place()))
    with open(log, "ab") as file:
        file.write(b"more\nlast")
    (tmp_path / "log[1].0").write_bytes(b"head\nanother file\n" * 20)
    (tmp_path / "log[1].d").mkdir()
    copy = tmp_path / "log[1]-20261129"
    copy.write_bytes(log.read_bytes())
    log.write_bytes(b"")  # the same inode
    tail = Tail(log, place)
    assert not tail.anew
    assert tail.read(100) == [b"more\n"]
    assert tail.read(100) == []  # the new one is empty: more may come to the earlier one
    tail = Tail(log, json.loads(json.dumps(tail.place())))
    log.write_bytes(b"new\n")
    assert [line for _ in range(3) for line in tail.read(100)] == [b"last", b"new\n"]
    assert len(seen) == 21


def test_a_short_place_is_found_by_its_inode_alone(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"head\n")
    tail = Tail(log)
    assert tail.read(100) == [b"head\n"]
    (tmp_path / "log.2").write_bytes(b"head\nold\n")
    log.rename(tmp_path / "log.1")
    log.write_bytes(b"new 1\n")
    again = Tail(log, tail.place())
    assert not again.anew
    assert again.read(100) + again.read(100) == [b"new 1\n"]
    (tmp_path / "log.1").unlink()
    again = Tail(log, tail.place())
    assert again.anew
    assert again.read(100) == [b"new 1\n"]


def test_what_comes_to_a_replaced_file_before_the_new_one_has_lines(tmp_path):
    """logrotate makes the new file at once, and the program writes to the old one until it is told."""
    log = tmp_path / "log"
    old = open(log, "wb", buffering=0)  # noqa: SIM115, written to after it was renamed
    old.write(b"one\n")
    tail = Tail(log)
    assert tail.read(100) == [b"one\n"]
    log.rename(tmp_path / "log.1")
    log.touch()
    assert tail.read(100) == []
    old.write(b"two\n")
    old.close()
    assert tail.read(100) == [b"two\n"]
    log.write_bytes(b"three\n")
    assert tail.read(100) == [b"three\n"]


def test_a_file_cut_short_that_has_grown_again(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n")
    tail = Tail(log)
    assert tail.read(100) == [b"one\n", b"two\n"]
    log.write_bytes(b"another one\nand more\n")
    assert tail.read(100) == [b"another one\n", b"and more\n"]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_where_a_long_line_is_cut_depends_on_its_bytes_alone(tmp_path, monkeypatch, most):
    monkeypatch.setattr(module, "LONGEST_LINE", 10)
    log = tmp_path / "log"
    for line, pieces in (
        ("x" * 10 + "\n", ["x" * 10, "\n"]),
        ("日本語の文字\n", ["日本語", "の文字\n"]),
        ("x日本語の文字" * 2 + "\n", ["x日本語", "の文字x", "日本語", "の文字\n"]),
    ):
        log.write_text("a\n" + line + "b\n", encoding="utf-8")
        tail = Tail(log)
        found = [piece for _ in range(99) for piece in tail.read(most)]
        assert [piece.decode() for piece in found] == ["a\n", *pieces, "b\n"]
    log.write_bytes(b"\x80" * 25 + b"\n")  # no character at all
    tail = Tail(log)
    assert [len(piece) for _ in range(99) for piece in tail.read(most)] == [10, 10, 6]


def test_a_line_longer_than_a_read_hides_nothing_after_it(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n" + b"x" * 2000 + b"\ntwo\n")
    tail = Tail(log)
    assert [len(line) for _ in range(3) for line in tail.read(256)] == [4, 2001, 4]
    with open(log, "ab") as file:
        file.write(b"no end " * 100)
    assert tail.read(256) == []
    assert tail.rest() == [b"no end " * 100]


def test_from_the_end_and_endless_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 10)
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    tail = Tail(log, from_end=True)
    assert tail.read(100) == []
    with open(log, "ab") as file:
        file.write(b"x" * 25)
    assert tail.read(100) == [b"x" * 10, b"x" * 10]
    assert tail.place()["offset"] == 27


# -- the command -------------------------------------------------------------------------------------------------------


def follow(capsys, folder, *arguments) -> list[dict]:
    assert cli.main(["score", "--model", str(folder), "--follow", "--json", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_once_with_a_state_is_the_whole(folder, tmp_path, capsys):
    log, state = tmp_path / "app.log", tmp_path / "state"
    found = []
    for part in (LINES[:20], LINES[20:31], [], [*LINES[31:], ODD, "unfinished"]):
        with open(log, "a") as file:
            file.writelines(part)
        found += follow(capsys, folder, log, "--once", "--state", state, "--quantile", 0.9)
    assert [row["text"] + "\n" for row in found] == [*LINES, ODD]
    assert [row["line"] for row in found] == list(range(1, 62))
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(folder)
    whole = score_text(model, tokenizer, "".join([*LINES, ODD]))
    assert sum(row["nats"] for row in found) == pytest.approx(whole.nats, rel=1e-5)
    assert [row["threshold"] is None for row in found] == [True] * 10 + [False] * 51
    assert found[-1]["above"] == (found[-1]["nats_per_token"] > found[-1]["threshold"])
    assert 1 <= sum(row["above"] for row in found) <= 20


def test_two_files_and_what_is_printed(folder, tmp_path, capsys):
    for name, lines in (("a", LINES[:5]), ("b", [*LINES[:3], "last"])):
        (tmp_path / name).write_text("".join(lines))
    a, b = tmp_path / "a", tmp_path / "b"
    assert cli.main(["score", "--model", str(folder), "--follow", "--once", str(a), str(b)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in rows} == {6}
    assert [row[5] for row in rows if row[0] == str(b)] == [*(line[:-1] for line in LINES[:3]), "last"]
    first = {row[0]: row[2:5] for row in reversed(rows)}
    assert first[str(a)] == first[str(b)]  # each file from its own zero state


def test_bytes_that_are_no_text(folder, tmp_path, capsys):
    log = tmp_path / "log"
    log.write_bytes(b"\xff\xfe ok\n")
    (row,) = follow(capsys, folder, log, "--once", "--per-token")
    assert row["text"] == "\ufffd\ufffd ok"
    assert len(row["log_probs"]) == row["tokens"]


def process(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "mambakit", "score", "--model", str(folder), "--follow", "--json"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_following_killing_and_stopping(folder, tmp_path, capsys):
    """A file grows while it is followed. SIGKILL loses no line: those after the last save come again. SIGTERM saves."""
    log, state = tmp_path / "log", tmp_path / "state"
    log.write_text("".join(LINES[:10]))
    found: list[dict] = []

    def read(running, count):
        found.extend(json.loads(running.stdout.readline()) for _ in range(count))

    running = process(folder, log, "--state", state, "--save-every", 0)
    read(running, 10)
    while not state.exists():
        time.sleep(0.05)
    with open(log, "a") as file:
        file.writelines(LINES[10:15])
    read(running, 5)
    running.kill()
    running.communicate(timeout=60)
    with open(log, "a") as file:
        file.writelines(LINES[15:20])
    running = process(folder, log, "--state", state)
    while not found or found[-1]["line"] < 20:
        read(running, 1)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, errors
    assert b"goes on from" in errors
    with open(log, "a") as file:
        file.writelines(LINES[20:40])
    later = follow(capsys, folder, log, "--state", state, "--once")
    assert [row["line"] for row in later] == list(range(21, 41))  # what was saved does not come again
    by_line = {row["line"]: row for row in found + later}
    assert [by_line[i]["text"] + "\n" for i in sorted(by_line)] == LINES[:40]
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    whole = score_text(model, mambakit.AutoTokenizer.from_pretrained(folder), "".join(LINES[:40]))
    assert sum(row["nats"] for row in by_line.values()) == pytest.approx(whole.nats, rel=1e-5)


def test_standard_input(folder):
    running = process(folder, "-")
    running.stdin.write(LINES[0].encode())
    running.stdin.flush()
    assert json.loads(running.stdout.readline())["text"] + "\n" == LINES[0]  # before its other end is closed
    out, errors = running.communicate(b"no end", timeout=60)
    assert running.returncode == 0, errors
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["no end"]


def test_mistakes(folder, tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("x\n")
    for arguments, message in (
        (["--follow"], "one of them"),
        ([str(log), "--once"], "--once has no effect without --follow"),
        ([str(log), "--quantile", "0.5"], "--quantile has no effect without --follow"),
        (["--follow", str(log), str(log)], "twice"),
        (["--follow", str(log), str(tmp_path / "." / "log")], "twice"),
        (["--follow", "/dev/null"], "is a pipe or a device"),
        (["--follow", str(log), "-"], "standard input is followed alone"),
        (["--follow", str(log), "--save-every", "3"], "--save-every has no effect without --state"),
        (["--follow", str(log), "--quantile", "0.99", "--window", "9"], "needs 100 values"),
        (["--follow", str(log), "--chunk-size", "9"], "--chunk-size has no effect with --follow"),
        (["--follow", str(tmp_path)], "is a folder"),
        (["--follow", "app.log.gz"], "is compressed"),
        (["--follow", str(log), "--state", str(tmp_path)], "is a folder"),
        (["--follow", str(log), "--once", "--state", str(log)], "truncated or damaged"),
    ):
        assert cli.main(["score", "--model", str(folder), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
