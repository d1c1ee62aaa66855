"""Outputs in the hands of Trainer's evaluation and of DataParallel, which gather tensors: the state stays out."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import transformers

import mambakit
from tests.models.configurations import BASE, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = [
    "MambaForCausalLM",
    "MambaForSequenceClassification",
    "FalconMambaForCausalLM",
    "FalconMambaForSequenceClassification",
]


def model_of(name: str):
    kind = getattr(mambakit, name)
    return kind(kind.config_class(**BASE, num_labels=3)).eval()


def test_every_configuration_names_the_cache(tmp_path):
    for config in (mambakit.MambaConfig(**BASE), mambakit.FalconMambaConfig(**BASE)):
        assert {"cache_params", "past_key_values", "cache"} <= set(config.keys_to_ignore_at_inference)
        config.save_pretrained(tmp_path)
        assert "keys_to_ignore" not in (tmp_path / "config.json").read_text()
        assert type(config).from_pretrained(tmp_path).keys_to_ignore_at_inference == config.keys_to_ignore_at_inference


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_trainer_evaluates_with_a_cache(name, hidden, tmp_path):
    pytest.importorskip("accelerate")
    model = model_of(name)
    model.config.output_hidden_states = hidden
    classifies = "Classification" in name
    rows = [
        {"input_ids": row, "labels": torch.tensor(i % 3) if classifies else row} for i, row in enumerate(tokens(7, 9))
    ]
    seen = []

    def measure(prediction):
        logits = prediction.predictions[0] if hidden else prediction.predictions
        seen.append((logits.shape, prediction.label_ids.shape))
        return {"mean": float(np.mean(logits))}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        per_device_eval_batch_size=3,
        use_cache=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, eval_dataset=rows, compute_metrics=measure)
    assert model.config.use_cache
    assert "eval_mean" in trainer.evaluate()
    assert seen == [((7, 3), (7,))] if classifies else [((7, 9, 61), (7, 9))]
    assert trainer.predict(rows).metrics["test_mean"] == pytest.approx(trainer.evaluate()["eval_mean"])


@pytest.fixture
def parallel(monkeypatch):
    """DataParallel's steps without its GPUs: replicas share the parameters, chunks are gathered by concatenation."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    gathering = importlib.import_module("torch.nn.parallel.scatter_gather")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [list(tensors)] * 2)

    def apply(target, dim, *tensors):
        return torch.stack(tensors) if tensors[0].dim() == 0 else torch.cat(tensors, dim)

    monkeypatch.setattr(gathering.Gather, "apply", staticmethod(apply))

    def run(model, ids, **options):
        replicas = replicate.replicate(model, [0, 1], detach=not torch.is_grad_enabled())
        return gathering.gather([r(part, **options) for r, part in zip(replicas, ids.chunk(2), strict=True)], "cpu")

    return run


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("name", [*CLASSES, "MambaModel"])
def test_replicas_gather(parallel, name, use_cache, return_dict):
    model = model_of(name)
    ids = tokens(4, 9)
    options = {"output_hidden_states": True, "return_dict": return_dict}
    with torch.no_grad():
        expected = model(ids, use_cache=False, **options)
        found = parallel(model, ids, use_cache=use_cache, **options)
    if return_dict:
        assert found.cache_params is None
        assert isinstance(found, type(expected))
        found, expected = found.to_tuple(), expected.to_tuple()
    assert worst(found[0], expected[0]) < 1e-6
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert worst(ours, theirs) < 1e-6


def test_replicas_train(parallel):
    model = pair("plain")[0].train()
    model.gradient_checkpointing_enable()
    ids = tokens(4, 9)
    parallel(model, ids, labels=ids[:2]).loss.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_replica_says_that_it_keeps_no_state(parallel):
    with torch.no_grad(), pytest.warns(UserWarning, match="DataParallel returns tensors alone"):
        parallel(pair("plain")[0], tokens(4, 9), use_cache=True)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel():
    model = pair("plain")[0].cuda()
    ids = tokens(6, 9).cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False)
        for use_cache in (None, True):
            found = torch.nn.DataParallel(model)(ids, use_cache=use_cache)
            assert found.cache_params is None
            assert worst(found.logits, expected.logits) < 1e-5
        assert torch.nn.DataParallel(model, [0])(ids).cache_params is not None
