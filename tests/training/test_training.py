"""Training: configuration, data, optimiser, schedule, and a whole run that learns and resumes exactly."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from rich.console import Console

import mambakit
from mambakit.training.config import TrainConfig
from mambakit.training.config_file import load_config
from mambakit.training.curve import sparkline
from mambakit.training.loop import train
from mambakit.training.optimizer import parameter_groups, schedule_factor
from mambakit.training.step import TrainingStep, _positions
from tests.models.configurations import pair, worst

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.\n"
)
QUIET = Console(quiet=True)


def test_config(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('learning_rate = 1\ntrain_files = ["a"]\n')
    config = load_config(path, ["steps=7", "resume=true", "out=runs/x", "heldout_files=['b','c']"])
    assert (config.learning_rate, config.steps, config.resume, config.out) == (1.0, 7, True, "runs/x")
    assert config.heldout_files == ["b", "c"]
    for override, message in (
        ("stps=3", "did you mean 'steps'"),
        ("steps=many", "steps is 'many', expected a int"),
        ("steps", "not of the form key=value"),
        ("schedule=linear", "choose one of cosine, wsd"),
        ("warmup=1.5", "fraction of the run"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, [override])
    path.write_text("= 1")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(path, [])


@pytest.mark.parametrize("name", ["tiny", "embedded"])
def test_the_shipped_configs_load(name, request):
    load_config(request.config.rootpath / "configs" / f"{name}.toml", [])


def test_what_is_decayed():
    model = pair("use_bias")[0]
    decayed, free = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith(("_proj.weight", "conv1d.weight"))
    spared = {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]}
    assert spared == {"A_log", "D", "bias", "weight"}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_schedules():
    values = [schedule_factor(p, "cosine", 0.1, 0.01) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert values == pytest.approx([0, 0.5, 1, 0.505, 0.01])
    values = [schedule_factor(p, "wsd", 0.0, 0.0) for p in (0.0, 0.5, 0.8, 0.9, 1.0)]
    assert values == pytest.approx([1, 1, 1, 0.5, 0])


def test_documents_of_a_row_do_not_meet():
    model = pair("plain")[0]
    rows = torch.randint(1, 61, (2, 13))
    begins = torch.zeros(2, 13, dtype=torch.bool)
    begins[0, 5] = begins[1, 0] = begins[1, 12] = True
    assert _positions(begins)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    step = TrainingStep(model, torch.optim.SGD(model.parameters()), 1.0, "float32", True)
    parts = [rows[:1, :5], rows[:1, 5:], rows[1:, :12]]
    total = sum(model(p, labels=p).loss * (p.shape[1] - 1) for p in parts)
    assert worst(step.loss(rows, begins), total / sum(p.shape[1] - 1 for p in parts)) < 1e-5


def small_config(tmp_path, **fields) -> TrainConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 150, encoding="utf-8")
    values = {
        "train_files": [str(path)], "heldout_files": [str(path)], "vocab_size": 300, "sequence_length": 32,
        "hidden_size": 32, "num_hidden_layers": 2, "batch_size": 4, "steps": 40, "learning_rate": 1e-2, "log_every": 5,
        "eval_every": 20, "checkpoint_every": 10, "out": str(tmp_path / "run"), "autocast": "float32",
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_exports(tmp_path):
    summary = train(small_config(tmp_path), QUIET)
    out = tmp_path / "run"
    curve = losses(out)
    assert curve[0] > 5.0
    assert curve[-1] < 0.6 * curve[0]
    assert summary["heldout_bits_per_character"] < 2.0  # a text of one sentence
    model = mambakit.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    tokenizer = mambakit.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    card = (out / "README.md").read_text()
    assert f"{summary['heldout_bits_per_character']:.3f}" in card
    assert (out / "loss.png").is_file() or "matplotlib" not in str(mambakit)
    assert not list(out.glob("*tmp*"))


def test_an_interrupted_run_continues_exactly(tmp_path):
    whole = small_config(tmp_path, out=str(tmp_path / "whole"))
    train(whole, QUIET)
    cut = small_config(tmp_path, out=str(tmp_path / "cut"))

    class StopError(Exception):
        pass

    import mambakit.training.run as training_run

    original, calls = training_run.save_checkpoint, []

    def stop_after_second(*args):
        original(*args)
        calls.append(args)
        if len(calls) == 2:
            raise StopError

    training_run.save_checkpoint = stop_after_second
    try:
        with pytest.raises(StopError):
            train(cut, QUIET)
    finally:
        training_run.save_checkpoint = original
    cut.resume = True
    train(cut, QUIET)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b
    cut.out = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run was ever started"):
        train(cut, QUIET)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="at step"):
        train(small_config(tmp_path, learning_rate=1e30, clip=1e30, warmup=0.0), QUIET)


@pytest.mark.parametrize(
    ("before", "autocast", "during"), [("highest", "bfloat16", "high"), ("high", "float32", "highest")]
)
@pytest.mark.parametrize("learning_rate", [1e-3, 1e30])
def test_the_callers_float32_products_are_as_before(tmp_path, before, autocast, during, learning_rate, monkeypatch):
    seen = []
    run = TrainingStep.run
    monkeypatch.setattr(
        TrainingStep, "run", lambda *given: (seen.append(torch.get_float32_matmul_precision()), run(*given))[1]
    )
    torch.set_float32_matmul_precision(before)
    try:
        config = small_config(tmp_path, autocast=autocast, learning_rate=learning_rate, clip=1e30, warmup=0.0)
        with pytest.raises(FloatingPointError) if learning_rate > 1 else contextlib.nullcontext():
            train(config, QUIET)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {during}


def test_fresh_rows_reach_the_step(tmp_path):
    """All rows fresh is a run whose state is dropped at every step: the first losses are equal, the later ones not."""
    found = []
    for fresh in (0.0, 1.0):
        config = small_config(
            tmp_path, stateful=True, fresh_rows=fresh, steps=4, log_every=1, out=str(tmp_path / f"fresh {fresh}"),
            heldout_files=[], checkpoint_every=0,
        )  # fmt: skip
        train(config, QUIET)
        found.append(losses(tmp_path / f"fresh {fresh}"))
    assert found[0][0] == found[1][0]
    assert all(carried != fresh for carried, fresh in zip(found[0][1:], found[1][1:], strict=True))


def test_sparkline():
    assert sparkline([3.0, 2.0, 1.0], 3)[0] == "█"
    assert sparkline([], 5) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40
