"""A folder belongs to one run: it is refused, resumed or overwritten, and a crash at any moment mixes no two runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mambakit.training.run as training_run
from mambakit.training import loop
from mambakit.training.checkpoint import checkpoints, find_checkpoints
from mambakit.training.config import TrainConfig
from mambakit.training.resumption import MAY_CHANGE, differences, plain_config
from tests.training.launch import launch
from tests.training.test_resume import kill_at_random, losses, start

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(training_run, "write_curve", lambda history, path, console: path.write_bytes(b"png"))


def config_of(folder: Path, **fields) -> TrainConfig:
    text = folder / "text.txt"
    if not text.is_file():
        text.write_text("All happy families are alike; every unhappy family is unhappy in its own way.\n" * 12)
    values = {
        "train_files": [str(text)], "tokenizer": "bytes", "sequence_length": 16, "hidden_size": 8,
        "num_hidden_layers": 1, "batch_size": 2, "steps": 5, "log_every": 2, "checkpoint_every": 2,
        "autocast": "float32", "out": str(folder / "run"),
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def train(config: TrainConfig) -> str:
    """What the run said."""
    output = io.StringIO()
    loop.train(config, Console(file=output, width=1000))
    return output.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# -- whose a folder is -------------------------------------------------------------------------------------------------


def test_a_used_folder_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    train(config_of(tmp_path))
    before = contents(tmp_path / "run")
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(ValueError, match=r"holds a run .*step-00000005.*resume=true.*overwrite=true.*another out"):
        train(config_of(tmp_path, seed=1))
    with pytest.raises(ValueError, match=r"seed was 0, is 1\. Set them back"):
        train(config_of(tmp_path, seed=1, resume=True))
    assert contents(tmp_path / "run") == before


def test_the_second_runs_model_and_checkpoints_are_its_own(tmp_path):
    """The first run is longer, so its checkpoints have higher numbers than those of the second, resumed run."""
    alone = config_of(tmp_path, seed=1, steps=5, out=str(tmp_path / "alone"))
    train(alone)
    train(config_of(tmp_path, seed=0, steps=9))
    stopped = config_of(tmp_path, seed=1, steps=3, overwrite=True)
    train(stopped)
    made = {p.name for p in checkpoints(tmp_path / "run" / "checkpoints")}
    assert made == {"step-00000002", "step-00000003"}
    again = config_of(tmp_path, seed=1, steps=5, resume=True)
    # The schedule depends on `steps`, so no uninterrupted run has the same weights; the steps of the losses do agree.
    assert "continuing from step 3" in train(again)
    assert [r["step"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())] == [
        2,
        3,
        4,
        5,
    ]
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["seed"] == 1
    assert '"seed": 1' in (tmp_path / "run" / "README.md").read_text()
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        mark = json.loads((path / "run.json").read_text())
        assert mark["run"] == json.loads((tmp_path / "run" / "run.json").read_text())["id"]
        assert mark["config"] == plain_config(again)
    train(config_of(tmp_path, seed=1, overwrite=True))
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")


def test_what_is_the_users_stays(tmp_path):
    train(config_of(tmp_path, max_shard_size="1KB", report_to=["tensorboard"], steps=9))
    run = tmp_path / "run"
    assert len(list(run.glob("model-*.safetensors"))) > 1
    mine = {
        "notes.txt": b"1", "model.safetensors.bak": b"2", "checkpoints/notes.txt": b"3", "tokens/mine.bin": b"4",
        "checkpoints/step-00000002/state.pt": b"5", "tensorboard/notes": b"6", "adapter/notes": b"7",
        "run.json.old": b"8",
    }  # fmt: skip
    for name, content in mine.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    train(config_of(tmp_path, seed=1, overwrite=True))
    after = contents(run)
    kept = {name.replace("step-00000002/", "step-00000002.kept1/"): content for name, content in mine.items()}
    assert {name: after[name] for name in kept} == kept
    assert not list(run.glob("model-*.safetensors"))
    assert [p.name for p in (run / "tensorboard").iterdir()] == ["notes"]
    assert {p.name for p in checkpoints(run / "checkpoints")} == {"step-00000004", "step-00000005"}
    assert len(list((run / "tokens").glob("*.npz"))) == 1
    shutil.copy(tmp_path / "text.txt", tmp_path / "other.txt")
    train(config_of(tmp_path, train_files=[str(tmp_path / "other.txt")], overwrite=True))
    assert len(list((run / "tokens").glob("*.npz"))) == 1, "the tokens of the run before are gone"


def test_a_file_put_there_while_the_run_goes_on_is_kept(tmp_path):
    train(config_of(tmp_path, steps=2, checkpoint_every=1))
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    record["files"]["model"].remove("README.md")
    (run / "run.json").write_text(json.dumps(record))
    (run / "README.md").write_text("my notes")
    train(config_of(tmp_path, steps=2, checkpoint_every=1, resume=True))
    assert (run / "README.md.kept1").read_text() == "my notes"
    assert "A Mamba model" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model-00001-of-00002.safetensors", "checkpoints/a", "metrics.jsonl"]
)
@pytest.mark.parametrize("fields", [{}, {"overwrite": True}])
def test_files_that_no_run_wrote_are_in_the_way(tmp_path, name, fields):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which no run wrote there"):
        train(config_of(tmp_path, **fields))
    assert contents(tmp_path / "run") == {name: b"mine"}


@pytest.mark.parametrize("fields", [{}, {"overwrite": True}])
def test_other_files_are_not_in_the_way(tmp_path, fields):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(config_of(tmp_path, steps=1, **fields))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fields", [{}, {"overwrite": True}, {"resume": True}])
def test_a_run_without_an_id_is_left_alone(tmp_path, fields):
    train(config_of(tmp_path))
    (tmp_path / "run" / "run.json").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"did not mark its runs.*rename or remove it, or choose another out"):
        train(config_of(tmp_path, **fields))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"id": 3}', '{"id": "a", "config": {}, "files": {"a": ["../../text.txt"]}}']
)
@pytest.mark.parametrize("fields", [{}, {"overwrite": True}, {"resume": True}])
def test_a_damaged_record_is_refused(tmp_path, text, fields):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(ValueError, match="does not describe a run"):
        train(config_of(tmp_path, **fields))
    assert (tmp_path / "text.txt").is_file()


def test_what_cannot_be_asked(tmp_path):
    with pytest.raises(ValueError, match="drop one of them"):
        config_of(tmp_path, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="out is empty"):
        config_of(tmp_path, out=" ")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        train(config_of(tmp_path, out=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="no run was ever started"):
        train(config_of(tmp_path, resume=True))
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_the_old_run(tmp_path):
    train(config_of(tmp_path))
    before = contents(tmp_path / "run")
    for fields in (
        {"train_files": ["nowhere.txt"]},
        {"batch_size": 64},
        {"tokenizer": "nowhere.json"},
        {"init_from": "nowhere/x"},
    ):
        with pytest.raises((ValueError, OSError)):
            train(config_of(tmp_path, overwrite=True, **fields))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("field", ["init_from", "tokenizer"])
def test_a_run_does_not_overwrite_what_it_starts_from(tmp_path, field):
    train(config_of(tmp_path, tokenizer="", vocab_size=270, steps=1))
    before = contents(tmp_path / "run")
    place = str(tmp_path / "run" / ("tokenizer.json" if field == "tokenizer" else ""))
    with pytest.raises(ValueError, match=f"{field} is .*which overwrite=true removes"):
        train(config_of(tmp_path, **{"tokenizer": "", field: place}, overwrite=True))
    assert contents(tmp_path / "run") == before
    train(config_of(tmp_path, **{"tokenizer": "", field: place}, steps=1, out=str(tmp_path / "other")))


def test_one_cache_of_tokens_for_two_runs_at_a_time(tmp_path, monkeypatch):
    """A second run fills the cache while the first one is writing it."""
    from mambakit.training.data import store

    cache = str(tmp_path / "cache")
    original, calls = store._batches, []

    def slow(pieces):
        for batch in original(pieces):
            yield batch
            calls.append(1)
            if len(calls) == 1:
                train(config_of(tmp_path, token_cache=cache, out=str(tmp_path / "second")))

    monkeypatch.setattr(store, "_batches", slow)
    train(config_of(tmp_path, token_cache=cache))
    assert weights(tmp_path / "run") == weights(tmp_path / "second")
    assert len(list(Path(cache).iterdir())) == 2


# -- what a resumption may change --------------------------------------------------------------------------------------


def test_every_field_is_compared():
    base = plain_config(TrainConfig())
    for field in dataclasses.fields(TrainConfig):
        value = base[field.name]
        other = (
            not value
            if isinstance(value, bool)
            else ["x"]
            if isinstance(value, list)
            else "x"
            if isinstance(value, str)
            else value + 1
        )
        told = differences(base, {**base, field.name: other})
        assert told == ([] if field.name in MAY_CHANGE else [f"{field.name} was {value!r}, is {other!r}"])
    assert base.keys() >= MAY_CHANGE
    older = {k: v for k, v in base.items() if k != "fresh_rows"}
    assert differences(older, base) == []
    assert differences(older, {**base, "fresh_rows": 0.5}) == ["fresh_rows was 0.0, is 0.5"]
    assert "does not have" in differences({**base, "mixture": 3}, base)[0]


def test_fields_that_may_change(tmp_path):
    for stateful in ({}, {"stateful": True}):
        out = str(tmp_path / f"run{len(stateful)}")
        train(config_of(tmp_path, out=out, accumulate=2, **stateful))
        moved = tmp_path / "moved.txt"
        shutil.copy(tmp_path / "text.txt", moved)
        said = train(config_of(
            tmp_path, out=out, steps=8, log_every=1, keep_checkpoints=1, accumulate=1, train_files=[str(moved)],
            resume=True, export_dtype="float32", recompute_selection=True, **stateful,
        ))  # fmt: skip
        assert "continuing from step 5" in said
        assert [p.name for p in checkpoints(Path(out) / "checkpoints")] == ["step-00000008"]


def test_other_contents_are_refused_by_field(tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("one two three four five six\n" * 3)
    config = config_of(tmp_path, heldout_files=[str(held)])
    train(config)
    held.write_text("another text altogether\n" * 3)
    with pytest.raises(ValueError, match="heldout_files: the contents differ"):
        train(dataclasses.replace(config, resume=True))
    with pytest.raises(ValueError, match="heldout_files: the contents differ"):
        train(dataclasses.replace(config, resume=True, heldout_files=[]))


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["short", "gone", "unmarked", "foreign", "unfinished"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, damage):
    train(config_of(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=3))
    folder = tmp_path / "run" / "checkpoints"
    last = folder / "step-00000005"
    if damage == "short":
        os.truncate(last / "state.pt", (last / "state.pt").stat().st_size - 1)
    elif damage == "gone":
        (last / "state.pt").unlink()
    elif damage == "unmarked":
        (last / "run.json").unlink()
    elif damage == "foreign":
        train(config_of(tmp_path, seed=7, out=str(tmp_path / "other")))
        shutil.rmtree(last)
        shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000005", last)
        shutil.copytree(last, folder / "step-00000099")
    else:
        last.rename(folder / "step-00000005.tmp")
    said = train(config_of(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=3, resume=True))
    assert "step-00000005" in said
    assert "is ignored" in said
    assert "continuing from step 4" in said
    mine = {p.name for p in checkpoints(folder, json.loads((tmp_path / "run" / "run.json").read_text())["id"])}
    assert mine == {"step-00000003", "step-00000004", "step-00000005"}
    rest = {p.name for p in folder.iterdir()} - mine
    assert rest == {
        "unmarked": {"step-00000005.kept1"}, "foreign": {"step-00000005.kept1", "step-00000099"},
    }.get(damage, set())  # fmt: skip


def test_no_checkpoint_is_whole(tmp_path):
    train(config_of(tmp_path))
    for found in find_checkpoints(tmp_path / "run" / "checkpoints"):
        os.truncate(found.path / "state.pt", 9)
    with pytest.raises(ValueError, match=r"no checkpoint .* is whole.*overwrite=true"):
        train(config_of(tmp_path, resume=True))


def test_changed_bytes_are_named(tmp_path):
    train(config_of(tmp_path))
    path = tmp_path / "run" / "checkpoints" / "step-00000005" / "state.pt"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(
        ValueError, match=r"step-00000005/state.pt .*damaged.*; remove step-00000005 to continue from an earlier"
    ):
        train(config_of(tmp_path, resume=True))


# -- crashes -----------------------------------------------------------------------------------------------------------


class CrashError(BaseException):
    """As a process that is killed: no handler of errors is asked."""


def crash_at(monkeypatch, number: int) -> list[int]:
    """Die at the ``number``-th change of a file's name or removal of a file, half the time just after it."""
    calls = [0]

    def patched(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > number:
                raise CrashError
            if calls[0] == number:
                if number % 2:
                    function(*args, **kwargs)
                raise CrashError
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rename", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, patched(getattr(os, name)))
    return calls


def test_a_crash_at_any_moment_mixes_no_two_runs(tmp_path):
    """The second run overwrites the first, dies at a random moment, and is started again as its user would."""
    second = config_of(tmp_path, seed=1, out=str(tmp_path / "alone"))
    train(second)
    train(config_of(tmp_path, steps=9, report_to=[]))
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    first = json.loads((tmp_path / "first" / "run.json").read_text())["id"]
    with pytest.MonkeyPatch.context() as patch:
        calls = crash_at(patch, 10**9)
        train(dataclasses.replace(second, out=str(tmp_path / "run"), overwrite=True))
        total = calls[0]
    assert total > 40
    draw = random.Random(5)
    for number in sorted(draw.sample(range(1, total), 24)):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "first", tmp_path / "run")
        again = dataclasses.replace(second, out=str(tmp_path / "run"), overwrite=True)
        for at in (number, draw.randrange(1, 40), 10**9):  # it dies twice, then comes through
            with pytest.MonkeyPatch.context() as patch:
                crash_at(patch, at)
                try:
                    train(again)
                except CrashError:
                    begun = json.loads((tmp_path / "run" / "run.json").read_text())["id"] != first
                    again = dataclasses.replace(again, resume=begun, overwrite=not begun)
        assert weights(tmp_path / "run") == weights(tmp_path / "alone"), number
        assert losses(tmp_path / "run") == losses(tmp_path / "alone"), number
        alone, run = (
            {n for n in contents(tmp_path / name) if not n.startswith("tokens/")} for name in ("alone", "run")
        )
        assert run == alone, number


@pytest.mark.slow
def test_a_killed_run_that_had_overwritten_another(tmp_path):
    alone = config_of(tmp_path, seed=1, steps=300, checkpoint_every=9, out=str(tmp_path / "alone"))
    train(alone)
    train(config_of(tmp_path, steps=400))
    second = dataclasses.replace(alone, out=str(tmp_path / "run"), overwrite=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    kill_at_random(start(second, tmp_path), metrics, 3)
    train(dataclasses.replace(second, overwrite=False, resume=True))
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


def test_a_line_of_the_metrics_that_is_no_text_ends_them(tmp_path):
    """As a disk that filled up, or a power cut, leaves it."""
    config = config_of(tmp_path, steps=6)
    train(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    first = metrics.read_bytes().splitlines(keepends=True)[0]
    metrics.write_bytes(first + b"\xff\xfe\x00\n")
    assert "nothing left to train" in train(dataclasses.replace(config, resume=True))


# -- two at a time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"overwrite": True}, {"resume": True}])
def test_two_runs_at_a_time_are_refused_and_a_dead_one_holds_nothing(tmp_path, fields):
    out = tmp_path / "run"
    out.mkdir()
    if fields:
        train(config_of(tmp_path, steps=1))
    hold = (
        f"import filelock, time; lock = filelock.FileLock({str(out / 'run.lock')!r}); lock.acquire(); "
        "print(1, flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.read(1) == b"1"
        before = contents(out)
        with pytest.raises(ValueError, match="another process is training in"):
            train(config_of(tmp_path, steps=1, **fields))
        assert contents(out) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    train(config_of(tmp_path, steps=1, **fields))


def test_a_run_within_a_run_is_refused(tmp_path, monkeypatch):
    original = training_run.save_checkpoint

    def nested(*args):
        with pytest.raises(ValueError, match="another process is training in"):
            train(config_of(tmp_path, resume=True))
        return original(*args)

    monkeypatch.setattr(training_run, "save_checkpoint", nested)
    train(config_of(tmp_path))
    monkeypatch.undo()
    train(config_of(tmp_path, resume=True))


def refused_in_every_process(folder: str):
    torch.set_num_threads(1)
    messages = []
    training_run.write_curve = lambda *_: None
    for fields in ({}, {}, {"seed": 3, "resume": True}, {"resume": True}):
        try:
            loop.train(config_of(Path(folder), parallel="ddp", **fields), QUIET)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_every_process_is_told(tmp_path):
    config_of(tmp_path)  # writes the text
    first, other = launch(refused_in_every_process, 2, str(tmp_path))
    assert first == other
    assert [bool(m) for m in first] == [False, True, True, False]
    assert "holds a run" in first[1]
    assert "seed was 0, is 3" in first[2]


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_run_leaves_no_folder(there, tmp_path):
    """What is refused after the folder was claimed, as a base model that is not there."""
    (tmp_path / "t.txt").write_text("The cat sat on the mat.\n" * 50)
    out = tmp_path / "runs" / "deep"
    if there:
        out.mkdir(parents=True)
    config = TrainConfig(train_files=[str(tmp_path / "t.txt")], out=str(out), init_from=str(tmp_path / "nowhere"))
    with pytest.raises((ValueError, OSError)):
        train(config)
    assert (tmp_path / "runs").exists() == there
