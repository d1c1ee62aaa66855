"""Reading files is shown on a terminal: names of files are what they are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mambakit.errors import CheckpointError, UsageError
from mambakit.training.config import TrainConfig
from mambakit.training.config_file import load_config
from mambakit.training.data.files import expand
from mambakit.training.prepare import prepare


def config_of(folder: Path, name: str) -> TrainConfig:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("The cat sat on the mat. " * 20)
    return TrainConfig(train_files=[str(path)], tokenizer="bytes")


@pytest.mark.parametrize("name", ["[a].txt", "[/v3].txt", ":smile:.txt", "x\x1b[31m.txt"])
def test_names_that_look_like_markup(name, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    data = prepare(config_of(tmp_path, name), tmp_path / "runs" / "[/v3]", console)
    assert data.train.tokens
    assert "\x1b[31m.txt" not in console.file.getvalue()


@pytest.mark.parametrize("suffix", [".npz", ".bin"])
@pytest.mark.parametrize("kind", ["empty", "half", "one byte short", "zeros", "pointer"])
def test_damaged_tokenised_files(suffix, kind, tmp_path):
    config = config_of(tmp_path, "t.txt")
    prepare(config, tmp_path / "run", Console(quiet=True))
    (path,) = (tmp_path / "run" / "tokens").glob(f"*{suffix}")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"", "half": whole[: len(whole) // 2], "one byte short": whole[:-1], "zeros": bytes(len(whole)),
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        }[kind]
    )  # fmt: skip
    if suffix == ".bin" and kind == "zeros":
        return  # contents of the right length cannot be told from others
    with pytest.raises(CheckpointError, match=r"delete (it|both), and the file is tokenised again"):
        prepare(config, tmp_path / "run", Console(quiet=True))


def test_empty_names_of_files():
    for name in ("", " "):
        with pytest.raises(UsageError, match="name is empty"):
            expand([name])


@pytest.mark.parametrize("line", ['{"text": ' + "9" * 5000 + "}", "[" * 100_000, '{"text": 5}', "[1]"])
def test_lines_that_are_no_objects_of_text(line, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2: (not a JSON object|no text under)"):
        prepare(TrainConfig(train_files=[str(path)], tokenizer="bytes"), tmp_path / "run", Console(quiet=True))


def test_the_shipped_configurations_are_within_the_limits():
    for path in (Path(__file__).resolve().parents[2] / "configs").glob("*.toml"):
        load_config(path, [])
