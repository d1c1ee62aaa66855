"""The whole model on a GPU: the CPU's numbers, training, generation, a captured step."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import CapturedStep, TrainingStep
from tests.models.configurations import MAMBA, NAMES, pair, tokens, worst

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32: TensorFloat-32 alone is 1e-3 off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_cpus_numbers(name):
    model = pair(name)[0].double()
    ids = tokens(2, 150)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        expected = model(ids, labels=ids, use_cache=True)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model = model.float().cuda()
    with torch.no_grad():
        out = model(ids.cuda(), labels=ids.cuda(), use_cache=True)
    assert worst(out.logits.cpu(), expected.logits) < 2e-5
    assert worst(out.cache_params.ssm_states.cpu(), expected.cache_params.ssm_states) < 2e-5
    model(ids.cuda(), labels=ids.cuda()).loss.backward()
    for n, p in model.named_parameters():
        assert worst(p.grad.cpu(), grads[n]) < 1e-4, n


@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
def test_generation_padding_and_chunks(name):
    model = pair(name)[0]
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 9:] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    model.cuda()
    for extra in ({}, {"prefill_chunk_size": 5}):
        out = model.generate(ids.cuda(), attention_mask=mask.cuda(), **options, **extra)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("b", [1, 3, 9])
@pytest.mark.parametrize("name", ["plain", "untied", "falcon", "gelu"])
def test_a_graph_generates_what_the_forward_does(name, b, monkeypatch):
    from mambakit.decoding import graph_step, registry
    from mambakit.models import generate

    model = pair(name)[0].cuda()
    ids = tokens(b, 7).cuda()
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, "pad_token_id": 0}
    plain = {"do_sample": False, "eos_token_id": None}
    made = []
    monkeypatch.setattr(
        graph_step.GraphDecoder, "__call__", lambda self, f=graph_step.GraphDecoder.__call__: made.append(1) or f(self)
    )
    free = model.generate(ids, **options, **plain)
    end = free.sequences[0, 20].item()  # the first row ends here at the latest
    asked = [
        plain,
        {"do_sample": False, "eos_token_id": end},
        {"do_sample": True, "seed": 3, "top_k": 5, "eos_token_id": end},
    ]
    fast = [model.generate(ids, **options, **extra) for extra in asked]
    assert made, "graphs ran"
    monkeypatch.setattr(generate, "graphs_serve", lambda *_: False)
    monkeypatch.setattr(registry, "why_not_captured", lambda *_, **__: "switched off")
    monkeypatch.setattr(registry, "DECODERS", (registry.FORWARD,))
    made.clear()
    for extra, result in zip(asked, fast, strict=True):
        expected = model.generate(ids, **options, **extra)
        assert torch.equal(result.sequences, expected.sequences), extra
        assert worst(result.past_key_values.ssm_states, expected.past_key_values.ssm_states) < 1e-4
        assert worst(result.past_key_values.conv_states, expected.past_key_values.conv_states) < 1e-4
        assert result.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert not made


def test_a_graph_follows_its_model(monkeypatch):
    """In place the weights may change; parameters that lie elsewhere are captured anew."""
    model = pair("plain")[0].cuda()
    ids = tokens(2, 7).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model.generate(ids, **options)
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.add_(0.5)
        model.backbone.layers[0].mixer.out_proj.weight.mul_(2)
    assert torch.equal(model.generate(ids, **options).cpu(), model.cpu().generate(ids.cpu(), **options))
    model.cuda()
    assert torch.equal(model.generate(ids, **options).cpu(), model.cpu().generate(ids.cpu(), **options))


def test_packed_equals_separate_in_bfloat16():
    model = pair("plain")[0].cuda().bfloat16()
    docs = [tokens(1, n).cuda() for n in (5, 1, 200, 33)]
    cu = torch.tensor([0, 5, 6, 206, 239], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        packed = model(torch.cat(docs, 1), cu_seqlens=cu).logits
        separate = torch.cat([model(doc).logits for doc in docs], 1)
    assert worst(packed, separate) < 2e-2  # bfloat16 products of another shape round differently


@pytest.mark.parametrize("name", ["plain", "state_size_64", "conv_kernel_3", "falcon"])
def test_a_captured_step_trains_like_an_eager_one(name):
    config_class, model_class = (
        (mambakit.MambaConfig, mambakit.MambaForCausalLM)
        if name in MAMBA
        else (mambakit.FalconMambaConfig, mambakit.FalconMambaForCausalLM)
    )
    base = pair(name)[0].state_dict()
    config = pair(name)[0].config
    assert isinstance(config, config_class)
    rows = [tokens(4, 65).cuda() for _ in range(8)]
    begins = torch.zeros_like(rows[0], dtype=torch.bool)
    curves = []
    for captured in (False, True):
        model = model_class(config)
        model.load_state_dict(base)
        model.cuda().train()
        step = TrainingStep(model, make_optimizer(model, 1e-3, (0.9, 0.95), 0.1), 1.0, "float32", False)
        run = CapturedStep(step) if captured else step
        curves.append([run.run(batch, begins)[0].item() for batch in rows])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] != curves[0][0]


def test_the_embedded_model_on_a_gpu():
    pipe = mambakit.pipeline("text-generation", device="cuda")
    assert pipe.model.dtype == torch.bfloat16
    out = pipe("It was a dark and stormy night", max_new_tokens=30, do_sample=False)[0]["generated_text"]
    assert len(out) > 80
