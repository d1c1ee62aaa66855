"""ONNX: two graphs over one file of weights give the model's logits and states, in any pieces, batch and length."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from mambakit import CheckpointError
from mambakit.cli import main
from mambakit.export import onnx as exporting
from mambakit.modules import MambaCache
from tests.models.configurations import pair, tokens
from tests.models.tiny import save_tiny

NAMES = ["plain", "untied", "use_bias", "no_conv_bias", "conv_kernel_3", "odd_everything", "falcon", "falcon_eps"]


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration(name, tmp_path):
    model = pair(name)[0]
    exporting.to_onnx(model, tmp_path)
    report = exporting.check(model, tmp_path, speed=False)
    assert report.error < 1e-5  # float32 sums in another order
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "step.onnx"]


def test_a_prompt_in_pieces_is_the_prompt_whole(tmp_path):
    """Of one session, the lengths 1, 13 and 27 at batch 2; then the step's graph from the same state."""
    model = pair("plain")[0]
    exporting.to_onnx(model, tmp_path)
    whole, step = (exporting.session(tmp_path / name) for name in ("model.onnx", "step.onnx"))
    ids = tokens(2, 41).numpy()
    expected, *end = exporting.run(whole, ids, exporting.first_states(model.config, 2))
    states, logits = exporting.first_states(model.config, 2), []
    for start, stop in ((0, 1), (1, 14), (14, 41)):
        piece, *states = exporting.run(whole, ids[:, start:stop], states)
        logits.append(piece)
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for state, wanted in zip(states, end, strict=True):
        np.testing.assert_allclose(state, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    one, *after = exporting.run(whole, ids[:, :1], states)
    stepped, *after_step = exporting.run(step, ids[:, :1], states)
    for found, wanted in zip((stepped, *after_step), (one, *after), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_the_state_is_the_caches(tmp_path):
    """A state that the model has read goes into the graph as it is."""
    model = pair("falcon")[0]
    exporting.to_onnx(model, tmp_path)
    cache = MambaCache(model.config, 1)
    ids = tokens(1, 20)
    with torch.no_grad():
        model(ids[:, :15], cache_params=cache)
        states = [cache.conv_states.numpy().copy(), cache.ssm_states.numpy().copy()]
        expected = model(ids[:, 15:], cache_params=cache).logits.numpy()
    found, *_ = exporting.run(exporting.session(tmp_path / "model.onnx"), ids[:, 15:].numpy(), states)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_names_and_free_dimensions(tmp_path):
    exporting.to_onnx(pair("plain")[0], tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "length"], "conv_states": [2, "batch", 64, 3], "ssm_states": [2, "batch", 64, 16],
        "logits": ["batch", "length", 61], "new_conv_states": [2, "batch", 64, 3],
        "new_ssm_states": [2, "batch", 64, 16],
    }  # fmt: skip
    assert sum(node.op_type == "Scan" for node in graph.node) == 2
    step = onnx.load(tmp_path / "step.onnx", load_external_data=False).graph
    assert not any(node.op_type == "Scan" for node in step.node)


def test_a_graph_that_differs_is_refused(tmp_path):
    model = pair("plain")[0]
    exporting.to_onnx(model, tmp_path)
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.add_(0.01)
    with pytest.raises(CheckpointError, match="onnxruntime differs from the model by"):
        exporting.check(model, tmp_path)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu'"):
        exporting.to_onnx(pair("gelu")[0], tmp_path / "a")
    with pytest.raises(CheckpointError, match="not a MambaModel"):
        exporting.to_onnx(pair("plain")[0].backbone, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path, capsys):
    save_tiny(tmp_path / "m", hidden_size=32)
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "onnx"), "--to", "onnx"]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime differs from the model by" in printed
    assert "step, onnxruntime" in printed
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "onnx"), "--to", "onnx"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "x.onnx.pt"), "--to", "pt2"]) == 2
    assert "ends with .pt2" in capsys.readouterr().err


def test_a_quantised_source_is_unpacked(tmp_path, capsys):
    save_tiny(tmp_path / "m", hidden_size=32)
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--dtype", "q8_0"]) == 0
    assert main(["export", str(tmp_path / "m.gguf"), str(tmp_path / "o"), "--to", "onnx", "--no-speed"]) == 0
    assert json.loads(json.dumps(sorted(p.name for p in (tmp_path / "o").iterdir())))[0] == "model.onnx"
    assert "tokens/s" not in capsys.readouterr().out
