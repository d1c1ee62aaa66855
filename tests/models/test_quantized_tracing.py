"""Quantised models where a call is recorded to run again: compiled as one graph, and exported for any length."""

from __future__ import annotations

import pytest
import torch

from tests.models.configurations import pair, tokens

FORMATS = ["int8", "int4", "fp8", "lossless"]
pytestmark = pytest.mark.filterwarnings("ignore")


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture(params=FORMATS)
def model(request):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return pair("use_bias")[0].eval().quantize(request.param)


@torch.no_grad()
def test_forward_compiles_as_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (tokens(2, 12), tokens(1, 40)):  # few rows: the native kernels; many: torch's product
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_cache_compiles_as_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    caches = model.backbone.new_cache(2), model.backbone.new_cache(2)
    for ids in (tokens(2, 12), tokens(2, 1)):
        got = compiled(ids, cache_params=caches[0]).logits
        assert torch.equal(got, model(ids, cache_params=caches[1]).logits)
    assert torch.equal(caches[0].conv_states, caches[1].conv_states)
    assert torch.equal(caches[0].ssm_states, caches[1].ssm_states)


@torch.no_grad()
def test_generate_of_a_compiled_model(model):
    ids = tokens(2, 7)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_the_gradient_of_the_input_compiles(model):
    """LoRA and soft prompts train through packed weights."""
    x = model.backbone.embeddings(tokens(1, 5)).detach()

    def loss(x):
        return model(inputs_embeds=x, use_cache=False).logits.square().mean()

    got, want = (x.clone().requires_grad_() for _ in range(2))
    torch.compile(loss, fullgraph=True, backend="aot_eager")(got).backward()
    loss(want).backward()
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-7)
    assert want.grad.norm() > 0


@torch.no_grad()
def test_export_with_a_dynamic_length(model, tmp_path):
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(Logits(model), (tokens(2, 9),), dynamic_shapes={"ids": {1: length}})
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for ids in (tokens(2, 5), tokens(2, 33)):
        torch.testing.assert_close(again(ids), Logits(model)(ids), rtol=1e-5, atol=1e-5)
    assert "mambakit.linear" in str(program.graph)
