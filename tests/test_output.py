"""What is printed: text of users as it is, tables that lose nothing on narrow terminals, plain lines in pipes."""

from __future__ import annotations

import ast
import io
import json
import random
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from mambakit.output import description_column, error_line, literal, printable, say, table, terminal

ROOT = Path(__file__).resolve().parents[1]
# What rich would take for markup, an emoji, a highlight; what would move the cursor or break the line.
TEXTS = [
    "runs/[/v3]",
    "[a].txt",
    "[b]x",
    "[/]",
    ":smile:",
    "[link=x]y[/link]",
    "a\\[b]",
    "x\x1b[31my",
    "two\nlines",
    "tab\there",
    "‮gpj.",
    "\udcff",
]


def console(width: int = 80, on_terminal: bool = True) -> Console:
    """One that reads markup, as a caller may hand in."""
    return Console(file=io.StringIO(), width=width, force_terminal=on_terminal, color_system=None, legacy_windows=False)


def written(on: Console) -> str:
    return on.file.getvalue()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("on_terminal", [True, False])
def test_text_of_users_is_never_markup(text, on_terminal):
    on = console(on_terminal=on_terminal)
    say(on, f"model in {text}")
    assert written(on) == "model in " + "\n".join(map(printable, text.split("\n"))) + "\n"
    table(("file", "n"), [(text, "1")], console=(on := console(on_terminal=on_terminal)))
    assert printable(text) in written(on)
    on = console(on_terminal=on_terminal)
    with on.status(literal(text)) as status:
        status.update(literal(text))
    with Progress(description_column(), console=on, transient=False) as bar:
        bar.add_task(text, total=1)
    if on_terminal:
        assert printable(text) in written(on)
    assert printable(text) in error_line(ValueError(text)) or "\n" in text or "\t" in text


def test_printable():
    assert printable("naïve 日本 [x] \\ 🙂") == "naïve 日本 [x] \\ 🙂"
    assert printable("a\x1b[0m\nb\u2028\udc80") == r"a\x1b[0m\nb\u2028\udc80"


def test_consoles_of_the_commands_read_no_markup():
    on = terminal()
    on.file = io.StringIO()
    on.print("[/v3] :smile:")
    assert written(on) == "[/v3] :smile:\n"


def test_a_long_line_is_not_broken_in_a_pipe():
    say(on := console(on_terminal=False), "x " * 300)
    assert written(on).count("\n") == 1


def test_nothing_prints_past_this_module():
    """No other module makes a console of its own that reads markup, or prints a string on one."""
    for path in (ROOT / "mambakit").rglob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"
            plain = any(k.arg == "markup" and ast.unparse(k.value) == "False" for k in node.keywords)
            assert not re.fullmatch(r"(.*\.)?console\.(print|log|rule|input)", function) or plain, where
            assert not (function.endswith(".status") and "console" in function) or "literal" in ast.unparse(node), where
            quiet = [ast.unparse(k.value) for k in node.keywords if k.arg == "quiet"]
            assert function not in ("Console", "rich.console.Console") or quiet == ["True"], where
            assert function not in ("TextColumn", "rich.print", "Table", "Prompt.ask") or "{task.completed" in where, (
                where
            )


def hints() -> list[str]:
    found = set()
    for path in (ROOT / "mambakit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "pip install" in node.value:
                found.add(node.value)
    return sorted(found)


def test_every_hint_to_install_an_extra_is_printed_with_its_brackets():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for hint in hints():
        for on in (console(), console(on_terminal=False), console(width=40)):
            say(on, hint)
            assert written(on).replace("\n", "") == printable(hint).replace("\n", "")
        assert hint.replace("\n", " ").strip() in error_line(ValueError(hint)) or "  " in hint or "\n" in hint
        named |= set(re.findall(r"mambakit\[(\w+)\]", hint))
    assert named <= set(extras)
    assert {"hf", "train", "serve", "peft", "eval", "constrain", "gpu"} <= named


def test_the_curve_s_hint(monkeypatch, tmp_path):
    import importlib.util

    from mambakit.training.curve import write_curve

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_curve([], tmp_path / "loss.png", on := console())
    assert 'pip install "mambakit[train]"' in written(on)


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS = ("file", "tokens", "nats", "perplexity", "bits/character", "bits/byte")
ROWS = [
    (
        "a_very_long_name_of_a_file/that_goes_on/and_on/chapter_one.txt",
        "1,234,567",
        "4,567,890.1",
        "4.0612",
        "1.2345",
        "1.2001",
    ),
    ("[a].txt", "1", "0.1", "inf", "nan", "0.0000"),
]


def test_in_a_pipe_lines_with_tabs():
    table(COLUMNS, ROWS, title="Scores", console=(on := console(width=20, on_terminal=False)))
    assert written(on) == "\n".join("\t".join(row) for row in [COLUMNS, *ROWS]) + "\n"
    table(("", ""), [("model", "x"), ("file", "a\tb")], console=(on := console(on_terminal=False)))
    assert written(on) == "model\tx\nfile\ta\\tb\n"


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 120, 200])
def test_nothing_is_lost_at_any_width(width):
    table(COLUMNS, ROWS, console=(on := console(width=width)))
    text = written(on)
    assert "…" not in text
    for row in ROWS:
        for number in row[1:]:
            assert number in text, "numbers are never cut or folded"
        first = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
        assert row[0] in (first or text)
    if width >= 60:
        assert max(map(len, text.splitlines())) <= max(width, len(ROWS[0][0]) + len("file: "))


def test_random_tables():
    choice = random.Random(0)
    letters = "ab[/]_ é日"
    for _ in range(200):
        columns = [f"c{i}" for i in range(choice.randrange(1, 8))]
        rows = [
            [
                "".join(choice.choices(letters, k=choice.randrange(40))).strip()
                if i % 2
                else f"{choice.uniform(0, 1e6):,.4f}"
                for i in range(len(columns))
            ]
            for _ in range(choice.randrange(4))
        ]  # fmt: skip
        table(columns, rows, console=(on := console(width=choice.choice([20, 40, 60, 80, 120]))))
        text, plain = written(on), re.sub(r"[\s│┃]", "", written(on))
        assert "…" not in text
        for row in rows:
            for i, cell in enumerate(row):
                if not i % 2:
                    assert cell in text
                elif len(columns) <= 2:
                    assert re.sub(r"\s", "", cell) in plain


@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_commands_tables(columns, monkeypatch, capsys, tmp_path):
    """env and info on a narrow terminal: every number of their JSON is there."""
    from mambakit import cli

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(["info", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert f"{config['parameters']:,}" in text
    for value in config["config"].values():
        assert str(value) in text
    assert cli.main(["env"]) == 0
    assert "…" not in capsys.readouterr().out
