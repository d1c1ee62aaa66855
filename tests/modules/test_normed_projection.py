"""A block whose in_proj is fp8: norm and projection are one op where nothing is on the modules."""

import pytest
import torch

from mambakit.modules.mixers import fused_layer
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def calls(monkeypatch):
    """Blocks take this CPU for a GPU; the number of calls of the op."""
    made: list[int] = []
    op = torch.ops.mambakit.normed_linear

    def counted(*arguments):
        made.append(1)
        return op(*arguments)

    monkeypatch.setattr(torch.ops.mambakit, "normed_linear", counted)
    monkeypatch.setattr(fused_layer, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused_layer, "run", lambda *_, **__: None)
    return made


@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
@torch.no_grad()
def test_the_same_logits_and_states(name, calls, monkeypatch):
    model, ids = pair(name)[0].eval().quantize("fp8"), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = model(ids, use_cache=True)
    assert len(calls) == model.config.num_hidden_layers
    cache = model(ids[:, :20], use_cache=True).cache_params
    last = model(ids[:, 20:], cache_params=cache).logits
    masked = model(ids, attention_mask=mask).logits
    monkeypatch.setattr(fused_layer, "on_gpu", lambda x: False)
    calls.clear()
    assert torch.equal(whole.logits, model(ids).logits)
    assert worst(last, whole.logits[:, 20:]) < 1e-5
    assert torch.equal(masked, model(ids, attention_mask=mask).logits)
    assert not calls


def test_modules_that_something_is_on_are_called(calls):
    model, ids = pair("plain")[0].eval().quantize("fp8"), tokens(1, 9)
    mixer, norm = model.backbone.layers[0].mixer, model.backbone.layers[0].norm
    for module in (mixer, norm, mixer.in_proj):
        seen: list[int] = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        calls.clear()
        model(ids)
        assert len(seen) == 1
        assert len(calls) == model.config.num_hidden_layers - 1 or torch.is_grad_enabled()
        handle.remove()


def test_a_gradient_takes_the_two_ops(calls):
    model, ids = pair("plain")[0].eval().quantize("fp8"), tokens(1, 9)
    x = model.backbone.embeddings(ids).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().mean().backward()
    assert x.grad.norm() > 0
    assert not calls


@pytest.mark.parametrize("format", ["int8", "int4", "lossless"])
@torch.no_grad()
def test_other_formats_call_their_modules(format, calls):
    pair("plain")[0].eval().quantize(format)(tokens(1, 9))
    assert not calls


@torch.no_grad()
def test_it_compiles_as_one_graph_and_is_exported(calls, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fused_layer, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused_layer, "run", lambda *_, **__: None)
    torch._dynamo.reset()
    model, ids = pair("use_bias")[0].eval().quantize("fp8"), tokens(2, 24)
    want = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, want)
    program = torch.export.export(model, (ids,), {"use_cache": False})
    assert "mambakit.linear" in str(program.graph)  # parameters may get gradients there: the two ops
    assert worst(program.module()(ids, use_cache=False).logits, want) < 1e-5
