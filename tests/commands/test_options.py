"""Options as the command line reads them: nothing empty, numbers within their limits, paths that can be written, near
misses."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import random

import pytest

from mambakit import cli
from mambakit.commands.options import Number, any_text, check_output_file, check_output_folder, text
from mambakit.errors import MambakitError, UsageError

# serve has limits of its own: tests/serving.
COMMANDS = [name for name in cli.COMMANDS if name != "serve"]


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """No command does anything: what it would be run with is kept."""
    seen = []

    def run(args):
        seen.append(args)
        return 0

    for name in cli.COMMANDS:
        monkeypatch.setattr(importlib.import_module(f"mambakit.commands.{name}"), "run", run)
    return seen


@pytest.fixture
def refused(capsys, reached):
    """The one line of standard error (after the usage, where argparse prints it) of a line that is refused."""

    def call(*argv: str) -> str:
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        assert code == 2, argv
        assert not reached, argv
        return capsys.readouterr().err.strip().splitlines()[-1]

    return call


def leaves():
    """(the words that lead to it, its parser) of every command, evaluate's benchmarks each for itself."""
    for name, parser in cli._parser().commands.items():
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            yield (name,), parser
        for word, sub in inner[0].choices.items() if inner else ():
            yield (name, word), sub


def options(wanted):
    """(words, positional arguments that are needed, action) of every option that takes a value and is `wanted`."""
    for words, parser in leaves():
        needed = ["x" for a in parser._actions if not a.option_strings and a.nargs in (None, "+")]
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and wanted(action):
                yield words, needed, action


def test_every_option_that_is_given_and_empty_is_refused(refused):
    count = 0
    for words, needed, action in options(lambda action: True):
        for option in action.option_strings:
            values = [""] * action.nargs if isinstance(action.nargs, int) else [""]
            message = refused(*words, *needed, option, *values)
            assert option in message, message
            if action.type in (None, text) and action.choices is None:
                assert f"{option} is empty" in message
                if len(values) == 1:
                    assert f"{option} is empty" in refused(*words, *needed, f"{option}=")
            count += 1
    assert count > 50


def test_every_positional_argument_that_is_empty_is_refused(refused):
    count = 0
    for words, parser in leaves():
        positional = [a for a in parser._actions if not a.option_strings and a.type is not any_text]
        for action in positional:
            given = ["" if a is action else "x" for a in positional]
            assert "is empty" in refused(*words, *given), (words, action.dest)
            count += 1
    assert count >= 9


@pytest.mark.parametrize("blank", [" ", "\t", "\n "])
def test_blank_names_are_refused_and_blank_texts_are_not(blank, refused, reached):
    for option in ("--model", "--device", "--save-state", "--load-state", "--prefix-cache", "--draft-model", "--file"):
        assert f"{option} is empty" in refused("generate", "x", option, blank)
    assert "FILE is empty" in refused("score", blank)
    assert "target is empty" in refused("convert", "x", blank)
    assert "model is empty" in refused("info", blank)
    assert cli.main(["generate", "x", "--stop", blank]) == 0
    assert cli.main(["score", "--prefix", blank, "--choice", blank]) == 0
    assert cli.main(["evaluate", "bpb", "x", "--separator", blank]) == 0
    assert cli.main(["generate", "", blank]) == 0, "a prompt may be empty: the text starts from nothing"
    assert reached[0].stop == [blank]


def test_every_number_has_limits(reached):
    for words, _, action in options(lambda a: a.type in (int, float) and not a.choices):
        assert words[0] == "serve", (
            f"{words}: {action.option_strings[0]} has no limits: give it integer(...) or real(...)"
        )


def test_no_number_outside_its_limits_gets_through(capsys, reached):
    """Negative, zero, NaN, infinite, huge and broken numbers, for every option; what is accepted is finite and not
    negative."""
    values = [
        "-1",
        "-3",
        "0",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e30",
        str(10**23),
        str(2**31),
        str(2**63),
        "9" * 5000,
        "1.5",
        "-0.5",
        "2",
        "x",
    ]
    refusals = 0
    for words, needed, action in options(lambda a: isinstance(a.type, Number)):
        for value in values:
            reached.clear()
            try:
                code = cli.main([*words, *needed, f"{action.option_strings[0]}={value}"])
            except SystemExit as stop:
                code = stop.code
            error = capsys.readouterr().err
            if not reached:
                refusals += 1
                assert code == 2
                assert action.option_strings[0] in error.splitlines()[-1]
                assert len(error.splitlines()[-1]) < 200
                continue
            found = getattr(reached[0], action.dest)
            for number in found if isinstance(found, list) else [found]:
                assert math.isfinite(number)
                assert action.type.low <= number <= action.type.high
                assert number >= 0
    assert refusals > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-new-tokens", "-3"), "--max-new-tokens is -3; it must be 0 or more"),
        (("--seed", str(10**23)), "--seed is 100000000000000000000000; it must be from 0 to 9223372036854775807"),
        (("--temperature", "nan"), "--temperature is nan; it must be a finite number, 0 or more"),
        (("--temperature", "inf"), "--temperature is inf; it must be a finite number"),
        (("--top-p", "0"), "--top-p is 0.0; it must be above 0, and at most 1"),
        (("--repetition-penalty", "0"), "--repetition-penalty is 0.0; it must be above 0"),
        (("--num-return-sequences", "0"), "--num-return-sequences is 0; it must be 1 or more"),
        (("--prefill-chunk-size", "0"), "--prefill-chunk-size is 0; it must be 1 or more"),
        (("--draft-tokens", "0"), "--draft-tokens is 0; it must be 1 or more"),
        (("--logprobs", "-1"), "--logprobs is -1; it must be 0 or more"),
        (("--top-k", "two"), "'two' is not a whole number"),
    ],
)
def test_numbers(arguments, message, refused):
    assert message in refused("generate", "x", *arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "generate --temprature 1 x",
            "mambakit generate: error: unrecognized arguments: --temprature; did you mean --temperature?",
        ),
        (
            "--temprature 1 x",
            "mambakit generate: error: unrecognized arguments: --temprature; did you mean `mambakit generate "
            "--temperature",
        ),
        ("--temprature=1 generate x", "did you mean `mambakit generate --temperature"),
        (
            "evaluate bpb f --batch-tokenz 3",
            "mambakit evaluate bpb: error: unrecognized arguments: --batch-tokenz 3; did you mean --batch-tokens?",
        ),
        ("score --chunksize 3 f", "did you mean --chunk-size?"),
        ("genrate x", "there is no command 'genrate'; did you mean 'generate'?"),
        ("generate x --zzz", "mambakit generate: error: unrecognized arguments: --zzz"),
        ("--zzz", "unrecognized arguments: --zzz; options come after the command"),
        ("train x.toml --resume", "mambakit train: error: unrecognized arguments: --resume"),
        ("zzz", "invalid choice: 'zzz'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)  # fmt: skip
def test_near_misses(line, message, refused):
    assert message in refused(*line.split())


@pytest.mark.parametrize(("name", "dtype"), [
    ("F32", "float32"), ("f32", "float32"), ("fp32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"),
    ("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("half", "float16"),
])  # fmt: skip
def test_a_dtype_has_the_names_of_other_programs(name, dtype, reached):
    assert cli.main(["generate", "x", "--dtype", name]) == cli.main(["convert", "a", "b", "--dtype", name]) == 0
    assert [args.dtype for args in reached] == [dtype, dtype]


def test_no_option_is_taken_for_a_longer_one(refused):
    """``generate --prompt TEXT`` would draft by --prompt-lookup."""
    for line in ("generate --prompt once", "generate x --max-new 5", "serve --state folder", "chat --temp 1"):
        short = next(word for word in line.split() if word.startswith("--"))
        assert f"unrecognized arguments: {short}" in refused(*line.split())
    assert "did you mean --prompt-lookup?" in refused("generate", "--prompt", "once")


def test_a_dtype_that_is_none(refused, reached):
    assert cli.main(["convert", "a", "b.gguf", "--dtype", "Q8_0"]) == 0
    assert reached.pop().dtype == "q8_0"
    assert "invalid choice: 'q4_k'" in refused("convert", "a", "b.gguf", "--dtype", "Q4_K")
    assert "invalid choice: 'q8_0'" in refused("generate", "x", "--dtype", "Q8_0")


def test_the_usage_is_the_command_s_own(capsys):
    with pytest.raises(SystemExit):
        cli.main(["score", "--temprature", "1"])
    assert capsys.readouterr().err.startswith("usage: mambakit score ")


# -- what is raised ----------------------------------------------------------------------------------------------------


class StrangeError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a\n  b"), 2, "mambakit env: error: a b"),
        (MambakitError("text\x1b[31m"), 2, r"mambakit env: error: text\x1b[31m"),
        (ValueError("bad"), 2, "mambakit env: error: bad (--debug shows the traceback)"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"), 2,
            "mambakit env: error: No such file or directory: a/b (--debug",
        ),
        (RuntimeError("first\nsecond"), 1, "mambakit env: error: RuntimeError: first second (--debug"),
        (KeyError("x"), 1, "mambakit env: error: KeyError: 'x' (--debug"),
        (AssertionError(), 1, "mambakit env: error: AssertionError (--debug"),
        (MemoryError(), 1, "mambakit env: error: MemoryError (--debug"),
        (StrangeError("[/b]" + "x" * 5000), 1, "mambakit env: error: StrangeError: [/b]xxx"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 2, "surrogates not allowed"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)  # fmt: skip
def test_whatever_is_raised_is_one_line(error, code, line, monkeypatch, capfd):
    def run(args):
        raise error

    monkeypatch.setattr(importlib.import_module("mambakit.commands.env"), "run", run)
    out = os.dup(1)  # a broken pipe's standard output is replaced
    try:
        assert cli.main(["env"]) == code
    finally:
        os.dup2(out, 1)
    written = capfd.readouterr().err
    assert line in written
    assert len(written.strip().splitlines()) == (1 if line else 0)
    assert len(written) < 800
    if code in (1, 2):
        for argv in (["--debug", "env"], ["env", "--debug"]):
            with pytest.raises(type(error)):
                cli.main(argv)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_output_paths(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    check_output_file("--save-state", str(tmp_path / "new"))
    check_output_file("--save-state", str(tmp_path / "file"))
    check_output_folder("target", str(tmp_path / "a" / "b"), new=True)
    check_output_folder("target", str(tmp_path), new=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "looking leaves nothing behind"
    for path, message in (
        (tmp_path, "is a folder; give the name of a file"),
        (f"{tmp_path}/x/", "is a folder; give the name of a file"),
        (tmp_path / "none" / "x", "there is no folder"),
        (tmp_path / "file" / "x", "is not a folder"),
        ("/dev/null/x", "is not a folder"),
        ("/proc/x", "nothing can be written in /proc"),
        ("/dev/null", "is a device, a pipe or a socket"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output_file("--save-state", str(path))
    for path, message in (
        (tmp_path, "is not empty; name a new folder"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "x" / "y", "is not a folder"),
        ("/proc/x", "nothing can be written in /proc"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output_folder("target", str(path), new=True)


def test_random_lines_are_run_or_refused_in_one_line(capsys, reached):
    """Words and options thrown together: a command is run with whole values, or the last line says what is wrong."""
    choice = random.Random(0)
    names = sorted({name for _, parser in leaves() for name in parser.option_names()} - {"--debug"})  # it raises
    words = [*COMMANDS, *names, "", " ", "x", "-1", "nan", "--", "-", "=", "--model=", "--x=y", "blimp", "bpb"]
    for _ in range(300):
        line = [choice.choice([*COMMANDS, choice.choice(words)]), *choice.choices(words, k=choice.randrange(5))]
        reached.clear()
        try:
            code = cli.main(line)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert code in (0, 2), line
        if code == 2:
            assert ": error: " in captured.err.strip().splitlines()[-1], line
