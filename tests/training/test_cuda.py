"""The step as a CUDA graph: what it does equals what it does run eagerly, whatever the recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

import mambakit
from mambakit.training.config import TrainConfig
from mambakit.training.data.rows import cut_rows
from mambakit.training.loop import train
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import CapturedStep, TrainingStep

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must want a wife.\n"


def make_model():
    torch.manual_seed(0)
    config = mambakit.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=True)
    return mambakit.MambaForCausalLM(config).cuda().train()


def batches(count, rows=4, length=33):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 60, (rows, length), generator=generator).cuda() for _ in range(count)]
    return [(t, torch.zeros_like(t, dtype=torch.bool)) for t in tokens]


def run(captured: bool, lengths=(32,), poison: int | None = None, **options):
    model = make_model()
    step = TrainingStep(model, make_optimizer(model, 1e-3, (0.9, 0.95), 0.1), 1.0, "float32", False, **options)
    stepper = CapturedStep(step) if captured else step
    losses = []
    for index, batch in enumerate(batches(14)):
        if index == 9:
            step.forget(np.ones(batch[0].shape[0], bool))
        kept = model.backbone.norm_f.weight.detach().clone()
        if index == poison:
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            model.backbone.norm_f.weight.data.fill_(float("nan"))
        loss, _ = stepper.run(*cut_rows(*batch, lengths[index % len(lengths)]))
        losses.append(loss)
        if index == poison:
            model.backbone.norm_f.weight.data.copy_(kept)
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "nothing was updated"
    return torch.stack(losses).cpu(), model, step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "ignored_token": 7},
        {"carry_rows": 4, "accumulate": 2},
        {"lengths": (32, 8), "spike_factor": 100.0},
        {"poison": 11},
    ],
    ids=str,
)
def test_the_graph_is_the_step(options):
    eager, graph = (run(captured, **options) for captured in (False, True))
    finite = torch.isfinite(eager[0])
    assert torch.equal(finite, torch.isfinite(graph[0]))
    assert int((~finite).sum()) == ("poison" in options)
    assert int(graph[2].guard.skipped) == int(eager[2].guard.skipped) == ("poison" in options)
    # The same kernels in the same order; the fused optimiser alone may round otherwise.
    assert torch.allclose(eager[0][finite], graph[0][finite], rtol=1e-4)
    for a, b in zip(eager[1].parameters(), graph[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


def test_a_run_on_a_gpu(tmp_path):
    """Length warm-up, graphs, bfloat16, resumed from its middle to the same losses."""
    (tmp_path / "t.txt").write_text(TEXT * 400)
    fields = {
        "train_files": [str(tmp_path / "t.txt")], "tokenizer": "bytes", "sequence_length": 128, "initial_length": 32,
        "batch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "steps": 60, "learning_rate": 5e-3, "log_every": 5,
        "checkpoint_every": 20, "keep_checkpoints": 9, "accumulate": 2,
    }  # fmt: skip
    out = tmp_path / "run"
    train(TrainConfig(**fields, out=str(out)), Console(quiet=True))
    losses = lambda: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    whole = losses()
    assert whole[-1]["loss"] < 0.5 * whole[0]["loss"]
    assert whole[-1]["mfu"] > 0
    (out / "checkpoints" / "step-00000060").rename(out / "gone")
    (out / "checkpoints" / "step-00000040").rename(out / "gone too")
    train(TrainConfig(**fields, out=str(out), resume=True), Console(quiet=True))
    assert [r["loss"] for r in losses()] == [r["loss"] for r in whole], "to the last bit"
