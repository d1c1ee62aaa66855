"""The command line as a user meets it: processes of their own, pipes, wrong inputs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]


def mambakit(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """`mambakit ...` in a process forked from a server that has imported torch and transformers once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.preloaded"])
    with contextlib.ExitStack() as files:
        streams = [files.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write((stdin or "").encode())
        streams[0].seek(0)
        process = context.Process(
            target=_command, args=([_Descriptor(f.fileno()) for f in streams], arguments, environment)
        )
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"mambakit {' '.join(arguments)} did not end")
        for stream in streams:
            stream.seek(0)
        out, err = (stream.read().decode() for stream in streams[1:])
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


class _Descriptor:
    """A file descriptor that is handed over when a process is started."""

    def __init__(self, number: int):
        self.number = number

    def __getstate__(self):
        from multiprocessing.reduction import DupFd

        return DupFd(self.number)

    def __setstate__(self, handed):
        self.number = handed.detach()


def _command(streams: list[_Descriptor], arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115, for the process's life
    os.environ.update(COLUMNS="120", **environment)
    os.chdir(ROOT)
    from mambakit.cli import main

    code = main(list(arguments))
    sys.stdout.flush()
    sys.exit(code)


def real(*arguments: str) -> str:
    """Of a process from its very start."""
    command = [sys.executable, "-m", "mambakit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def good(*arguments: str, **kwargs) -> str:
    done = mambakit(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, eos_token_id=303)  # no token of its tokenizer: texts run to their full length
    return str(folder)


def modules_of(*arguments: str) -> set[str]:
    code = (
        "import sys, mambakit.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return {m.split(".")[0] for m in done.stdout.rsplit("MODULES", 1)[1].split()}


def test_help_is_light():
    assert not {"torch", "transformers", "numpy"} & modules_of("--help")
    text = real("--help")
    for command in ("generate", "score", "evaluate", "train", "info", "convert", "quantize", "run", "env"):
        assert command in text
        assert "usage:" in good(command, "--help")
    assert good("--version").startswith("mambakit ")


def test_env():
    assert "transformers" not in modules_of("env")
    report = json.loads(real("env", "--json"))
    assert set(report) == {"versions", "devices", "implementations", "mamba_ssm"}
    assert {"module": "mamba_ssm", "given": True, "place": None, "why": "not installed"} in report["mamba_ssm"]
    served = {(row["op"], row["device"]): row["serves"] for row in report["implementations"]}
    assert served["selective_scan", "cpu"]
    assert "selective_scan" in good("env")


def test_the_embedded_model_is_the_default():
    out = real("generate", "It was a dark and stormy night", "--max-new-tokens", "12", "--greedy")
    assert out.startswith("It was a dark and stormy night")
    assert len(out) > 40


def test_generate_streams_the_same_text_as_json(model):
    options = ("--model", model, "--seed", "3", "--max-new-tokens", "12")
    plain = good("generate", "The cat", *options)
    record = json.loads(good("generate", "The cat", "--json", *options))
    assert plain == "The cat" + record["text"] + "\n"
    assert record["prompt"] == "The cat"
    assert len(record["tokens"]) == 12
    assert record["finish_reason"] == "length"
    assert good("generate", "The cat", *options[:2], "--seed", "4", "--max-new-tokens", "12") != plain


def test_prompts_from_stdin_and_files(model, tmp_path):
    options = ("--model", model, "--greedy", "--max-new-tokens", "5", "--json")
    by_argument = json.loads(good("generate", "The dog — naïve", *options))
    (tmp_path / "p.txt").write_text("The dog — naïve", encoding="utf-8")
    lines = [
        good("generate", *options, stdin="The dog — naïve"),
        good("generate", "-", *options, stdin="The dog — naïve"),
        good("generate", "--file", str(tmp_path / "p.txt"), *options),
    ]
    for line in lines:
        assert json.loads(line)["tokens"] == by_argument["tokens"]
    two = good("generate", "one", "two", "--num-return-sequences", "2", *options).splitlines()
    assert [json.loads(line)["prompt"] for line in two] == ["one", "one", "two", "two"]
    assert json.loads(good("generate", "", *options))["prompt_tokens"] == 1


def test_a_state_saved_and_loaded_continues(model, tmp_path):
    options = ("--model", model, "--greedy", "--json")
    whole = json.loads(good("generate", "The cat sat on the mat, and the dog", "--max-new-tokens", "9", *options))
    state = str(tmp_path / "s.safetensors")
    good("generate", "The cat sat on the mat,", "--max-new-tokens", "0", "--save-state", state, *options)
    rest = json.loads(good("generate", " and the dog", "--max-new-tokens", "9", "--load-state", state, *options))
    assert rest["tokens"] == whole["tokens"]
    # what was written belongs to the state too
    first = json.loads(good("generate", "The cat", "--max-new-tokens", "4", "--save-state", state, *options))
    text = json.loads(good("generate", "The cat" + first["text"] + " by", "--max-new-tokens", "5", *options))
    after = json.loads(good("generate", " by", "--max-new-tokens", "5", "--load-state", state, *options))
    assert after["tokens"] == text["tokens"]


def test_score(model, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("The cat sat on the mat.\n" * 20, encoding="utf-8")
    record = json.loads(good("score", str(path), "--model", model, "--json", "--per-token"))
    assert record["characters"] == record["bytes"] == 480
    assert record["tokens"] == len(record["log_probs"])
    assert -sum(record["log_probs"]) == pytest.approx(record["nats"], rel=1e-5)
    small = json.loads(good("score", "-", "--model", model, "--json", "--chunk-size", "5", stdin=path.read_text()))
    assert small["nats"] == pytest.approx(record["nats"], rel=1e-5)
    assert "bits/character" in good("score", str(path), "--model", model)


def test_quantised_folders(model, tmp_path):
    plain = json.loads(good("info", model, "--json"))
    packed, back = str(tmp_path / "packed"), str(tmp_path / "back")
    assert "MiB of weights" in good("quantize", model, packed, "--to", "int8", "--group", "128")
    info = json.loads(good("info", packed, "--json"))
    assert (info["parameters"], info["state_bytes"]) == (plain["parameters"], plain["state_bytes"])
    assert info["dtypes"].keys() == {"int8", "float32"}
    done = mambakit("convert", packed, back)
    assert done.stdout.strip() == back
    assert f"{packed} is quantised (int8): dequantised to plain weights" in done.stderr
    assert json.loads(good("info", back, "--json"))["dtypes"] == plain["dtypes"]
    again = mambakit("quantize", packed, str(tmp_path / "again"), "--to", "lossless")
    assert f"{packed} is quantised (int8): its rounded weights are packed anew" in again.stderr
    assert json.loads(good("info", str(tmp_path / "again"), "--json"))["dtypes"].keys() == {"lossless32", "float32"}
    options = ("--greedy", "--max-new-tokens", "6", "--json")
    a, b = (json.loads(good("generate", "The", "--model", m, *options)) for m in (packed, back))
    assert a["tokens"] == b["tokens"]


def test_info_and_convert(model, tmp_path):
    assert json.loads(good("info", model, "--json"))["format"] == "transformers"
    assert "17,965,056" in good("info")
    target = str(tmp_path / "original")
    assert good("convert", model, target, "--to", "original").strip() == target
    assert json.loads(good("info", target, "--json"))["format"] == "original"
    options = ("--greedy", "--max-new-tokens", "6", "--json")
    a, b = (json.loads(good("generate", "The", "--model", m, *options)) for m in (model, target))
    assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--model", "no/such/model/folder"), "neither a folder here nor a hub id"),
        (("generate", "x", "--top-p", "7"), "--top-p is 7.0"),
        (("generate", "x", "--device", "cuda:99"), "--device cuda:99"),
        (("generate", "--file", "no-such-file"), "no-such-file"),
        (("generate", "x", "--load-state", "no-such-state"), "make one with --save-state"),
        (("generate", "x", "y", "--save-state", "s"), "give one prompt"),
        (("score", "no-such-file"), "there is no text file no-such-file"),
        (("score", "README.md", "--per-token"), "add --json"),
        (("train", "no-such-config.toml"), "there is no configuration file"),
        (("train", "configs/tiny.toml", "lerning_rate=1"), "did you mean 'learning_rate'"),
        (("train", "configs/tiny.toml"), "train_files is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    done = mambakit(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" in mambakit("--debug", *arguments).stderr


def test_a_closed_pipe_is_silent(model):
    command = f"{sys.executable} -m mambakit generate 'The cat' --model {model} --max-new-tokens 300 | head -c 20"
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT)  # bytes: head may cut a character
    assert done.stdout.startswith(b"The cat")
    assert b"Traceback" not in done.stderr
