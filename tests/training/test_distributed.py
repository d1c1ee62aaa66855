"""DDP, FSDP and context parallelism in `mambakit train`: the curve of one process, and resumption to the last bit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import mambakit.training.run as training_run
from mambakit.training import loop
from mambakit.training.checkpoint import checkpoints
from mambakit.training.config import TrainConfig
from mambakit.training.distributed import ProcessMesh, process_mesh
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import CapturedStep, Objective, TrainingStep
from tests.models.configurations import pair, worst
from tests.training.launch import launch

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = Console(quiet=True)
TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune must want a wife.\n"


def batch():
    torch.manual_seed(2)
    rows = torch.randint(1, 61, (8, 18))
    begins = torch.zeros(8, 18, dtype=torch.bool)
    # Documents that begin at a shard's first token (17 tokens over 2: 9 and 8), one before, in a row's first and last.
    for row, token in ((0, 9), (1, 8), (2, 0), (2, 17), (3, 4), (3, 5), (5, 9), (6, 16)):
        begins[row, token] = True
    return rows, begins


def untrained():
    torch.manual_seed(1)
    return pair("untied")[0].train()


def update(mode: str, context: int, respect: bool, accumulate: int, clip: float = 0.5, options: dict | None = None):
    """Loss, gradient norm, the held-out loss of an odd number of rows, and the parameters after two updates."""
    model = untrained()
    with process_mesh(mode, context) as mesh:
        objective = mesh.parallelize(Objective(model), model, **(options or {}))
        # A large eps: Adam's own division would hide a gradient's scale, and follow its rounding where it is tiny.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, fused=True)
        step = TrainingStep(
            model, optimizer, clip, "float32", respect, accumulate=accumulate, processes=mesh, objective=objective
        )
        rows, begins = batch()
        results = [tuple(map(float, step.run(rows, begins))) for _ in range(2)]
        with torch.no_grad():
            heldout = float(step.loss(rows[:3, :14], begins[:3, :14]))
        whole = mesh.whole(model)
        weights = None if whole is None else {n: p.detach().numpy() for n, p in whole.named_parameters()}
    return [*results[0], *results[1], heldout], weights


@pytest.mark.parametrize(
    "world, mode, context, respect, accumulate",
    [
        pytest.param(2, "ddp", 1, True, 2, id="2, ddp, documents, accumulated"),
        pytest.param(2, "fsdp", 1, False, 2, id="2, fsdp, accumulated"),
        pytest.param(2, "ddp", 2, True, 1, id="2, ddp, documents over both"),
        pytest.param(4, "fsdp", 2, True, 2, id="4, fsdp, documents over two, accumulated"),
        pytest.param(4, "ddp", 4, False, 1, id="4, ddp, a row over four"),
    ],
)
def test_an_update_is_one_processes(world, mode, context, respect, accumulate):
    before = dict(untrained().named_parameters())
    numbers, weights = update("none", 1, respect, accumulate)
    results = launch(update, world, mode, context, respect, accumulate)
    for actual, _ in results:
        assert actual == pytest.approx(numbers, rel=1e-4)
    assert [w is not None for _, w in results] == [True] + [False] * (world - 1)
    assert results[0][1].keys() == weights.keys()
    for name, expected in weights.items():
        moved = expected - before[name].detach().numpy()
        assert np.abs(moved).max() > 0
        error = worst(torch.from_numpy(results[0][1][name]), torch.from_numpy(expected))
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_exchanged_in_bfloat16(mode):
    """Not those of float32, by a rounding; the parameters stay float32."""
    before = dict(untrained().named_parameters())
    numbers, weights = update("none", 1, False, 2)
    ((actual, found), _) = launch(update, 2, mode, 1, False, 2, 0.5, {"reduce_dtype": torch.bfloat16})
    assert actual == pytest.approx(numbers, rel=1e-2)
    assert actual != pytest.approx(numbers, rel=1e-6)
    for name, expected in weights.items():
        assert found[name].dtype == np.float32
        moved = torch.from_numpy(expected - before[name].detach().numpy())
        error = (torch.from_numpy(found[name] - expected).norm() / moved.norm()).item()
        assert error < 2e-2, f"{name}: {error:.1e}"


def test_shards_that_stay_gathered():
    numbers, weights = update("none", 1, True, 1)
    ((actual, found), _) = launch(update, 2, "fsdp", 1, True, 1, 0.5, {"reshard_after_forward": False})
    assert actual == pytest.approx(numbers, rel=1e-4)
    for name, expected in weights.items():
        assert worst(torch.from_numpy(found[name]), torch.from_numpy(expected)) < 1e-5, name


def small_config(folder: Path, **fields) -> TrainConfig:
    text = folder / "text.txt"
    if not text.is_file():
        text.write_text(TEXT * 100, encoding="utf-8")
    values = {
        "train_files": [str(text)], "validation_fraction": 0.0, "heldout_files": [str(text)], "vocab_size": 280,
        "sequence_length": 24, "hidden_size": 16, "num_hidden_layers": 2, "batch_size": 4, "steps": 12,
        "learning_rate": 1e-2, "log_every": 2, "eval_every": 6, "checkpoint_every": 4, "autocast": "float32",
        "export_dtype": "float32",
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class StopError(Exception):
    pass


def run_cut_and_resumed(folder: str, fields: dict):
    """A whole run, and one that dies at its second checkpoint and goes on."""
    summary = loop.train(small_config(Path(folder), **fields, out=f"{folder}/whole"), QUIET)
    original, calls = training_run.save_checkpoint, []

    def stop_after_second(*args):
        original(*args)
        calls.append(args)
        if len(calls) == 2:
            raise StopError

    training_run.save_checkpoint = stop_after_second
    with contextlib.suppress(StopError):
        loop.train(small_config(Path(folder), **fields, out=f"{folder}/cut"), QUIET)
    training_run.save_checkpoint = original
    assert len(calls) == 2
    again = loop.train(small_config(Path(folder), **fields, out=f"{folder}/cut", resume=True), QUIET)
    return summary["heldout_perplexity"], again["heldout_perplexity"]


def go_on(folder: str, fields: dict) -> None:
    loop.train(small_config(Path(folder), **fields), QUIET)


@pytest.mark.parametrize(
    "world, fields",
    [
        pytest.param(4, {"parallel": "ddp"}, id="4, ddp"),
        pytest.param(2, {"parallel": "ddp", "stateful": True, "fresh_rows": 0.4}, id="2, ddp, carried state"),
        pytest.param(2, {"parallel": "fsdp", "activation_checkpointing": True}, id="2, fsdp, activations checkpointed"),
        pytest.param(
            2, {"parallel": "fsdp", "context_parallel": 2, "respect_documents": True}, id="2, a row over both"
        ),
    ],
)
def test_a_run_is_one_processes_and_resumes_to_the_last_bit(world, fields, tmp_path):
    alone = {name: value for name, value in fields.items() if name not in ("parallel", "context_parallel")}
    loop.train(small_config(tmp_path, **alone, out=str(tmp_path / "alone")), QUIET)
    scores = launch(run_cut_and_resumed, world, str(tmp_path), fields)
    assert len({score for pairs in scores for score in pairs}) == 1
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(checkpoints(tmp_path / "whole" / "checkpoints")) == 2
    if fields["parallel"] == "fsdp":
        whole = str(tmp_path / "whole")
        longer = {**alone, "steps": 14, "resume": True}
        loop.train(small_config(tmp_path, **longer, out=str(tmp_path / "alone")), QUIET)
        launch(go_on, 4, str(tmp_path), {**longer, **fields, "out": whole})  # more processes than wrote it
        assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
        assert len(losses(tmp_path / "whole")) == 7
        sharded = small_config(tmp_path, out=whole, resume=True)
        with pytest.raises(ValueError, match="was written with parallel=fsdp"):
            loop.train(sharded, QUIET)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="launch it with torchrun --nproc-per-node"):
        loop.train(small_config(tmp_path, parallel="ddp", out=str(tmp_path / "run")), QUIET)
    with pytest.raises(ValueError, match="set it to ddp or fsdp"):
        small_config(tmp_path, context_parallel=2)
    with pytest.raises(ValueError, match="stateful carries the state"):
        small_config(tmp_path, context_parallel=2, parallel="ddp", stateful=True)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='2 processes were launched, but parallel is "none"'):
        loop.train(small_config(tmp_path, out=str(tmp_path / "run")), QUIET)


def capturable(mode: str):
    with process_mesh(mode) as mesh:
        objective = Objective(untrained())
        step = TrainingStep(
            objective.model, make_optimizer(objective.model, 1e-3, (0.9, 0.95), 0.1), 1.0, "float32", False,
            processes=mesh,
        )  # fmt: skip
        if not mesh.capturable:
            with pytest.raises(ValueError, match=f"parallel={mode} and context_parallel=1 cannot be a CUDA"):
                CapturedStep(step)
        return mesh.capturable


def test_options_of_several_processes_are_refused_for_one():
    for fields in ({"reduce_dtype": "bfloat16"}, {"reshard_after_forward": False, "parallel": "ddp"}):
        with pytest.raises(ValueError, match="or drop it"):
            TrainConfig(train_files=["text.txt"], **fields)
    with pytest.raises(ValueError, match="choose one of float32, bfloat16"):
        TrainConfig(train_files=["text.txt"], reduce_dtype="float16", parallel="ddp")


def test_exchanges_are_captured_on_gpus_alone():
    assert ProcessMesh("none", torch.device("cpu")).capturable
    assert not any(launch(capturable, world, mode)[0] for world, mode in ((1, "ddp"), (2, "fsdp")))


def uneven(context: int):
    with pytest.raises(ValueError, match="do not divide into groups of context_parallel=3"):
        ProcessMesh("ddp", torch.device("cpu"), 3)
    with process_mesh("ddp", context) as mesh:
        with pytest.raises(ValueError, match="make it a multiple of 2"):
            mesh.require_even(7, "batch_size")
        model = pair("plain")[0]
        mesh.parallelize(Objective(model), model)
        ids = torch.ones(1, 8, dtype=torch.int64)
        messages = []
        for arguments in (
            {"attention_mask": ids}, {"position_ids": ids}, {"use_cache": True},
            {"cache_params": model.backbone.new_cache(1)}, {"input_ids": ids[:, :2]},
        ):  # fmt: skip
            if context > 1:
                with pytest.raises(ValueError) as error:
                    model(**{"input_ids": ids, **arguments})
                messages.append(str(error.value))
    return messages


def test_processes_that_do_not_fit():
    assert launch(uneven, 2, 1) == [[], []]
    messages = launch(uneven, 4, 2)[0]
    for message, part in zip(
        messages,
        ("no attention_mask", "no position_ids", "keeps no cache", "no cache_params", "looks back"),
        strict=True,
    ):
        assert part in message
