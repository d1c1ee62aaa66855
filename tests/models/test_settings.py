"""Models write, train and verify the same whatever torch's default dtype and device are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mambakit
from mambakit.decoding.registry import token_step, verifier
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from tests.decoding.eager_graph import native_serves
from tests.models.configurations import pair, tokens
from tests.torch_settings import SETTINGS, setting

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["float32", "bfloat16", "float64", "int8", "int4", "lossless", "falcon"]


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = pair("falcon" if kind == "falcon" else "use_bias")[0]
    if kind in ("int8", "int4", "lossless"):
        model.quantize(kind)
    elif kind != "falcon":
        model.to(getattr(torch, kind))
    model.generation_config.eos_token_id = None
    return model


def written(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Tokens, logits and states of every way to write a text."""
    options = {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    greedy = model.generate(ids, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)
    found = [greedy.sequences, *greedy.logits, greedy.past_key_values.conv_states, greedy.past_key_values.ssm_states]
    found.append(
        model.generate(ids, do_sample=True, temperature=0.9, top_k=20, repetition_penalty=1.1, seed=1, **options)
    )
    found.append(model.generate(ids, do_sample=False, prefill_chunk_size=3, **options))
    with torch.no_grad():
        cache = model.backbone.new_cache(1)
        model(ids[:1], cache_params=cache)
        step = token_step(model, cache)
        found += [step(ids[:1, i]).clone() for i in range(3)]
        verify = verifier(model, cache, 4)
        found.append(verify(ids[:1, :4])[0])
        verify.commit([3])
        found += [cache.conv_states.clone(), cache.ssm_states.clone()]
    requests = [
        Request(row, Sampling(temperature=t, seed=3), max_new_tokens=4) for row, t in zip(ids, (0, 0.9), strict=True)
    ]
    Engine(model, 2).write(requests)
    return [*found, *(torch.tensor(r.tokens, dtype=torch.int64, device="cpu") for r in requests)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_does_not_depend_on_torchs_settings(kind):
    model, ids = model_of(kind), tokens(2, 9)
    expected = written(model, ids)
    for name in SETTINGS:
        with setting(name):
            found = written(model, ids)
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.dtype == theirs.dtype, (name, i)
            assert torch.equal(ours, theirs), (name, i)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"meta"}))
def test_beams_do_not_depend_on_torchs_settings(name):
    """Of "meta" they do: transformers' own beam search makes tensors on the default device."""
    model, ids = model_of("int8"), tokens(2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with setting(name):
        assert torch.equal(model.generate(ids, **options), expected)


def trained(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter; of a packed row, too, and through a state."""
    model.train()
    found = []
    cu_seqlens = torch.tensor([0, 4, ids.numel()], dtype=torch.int32, device="cpu")
    for inputs in (
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids.reshape(1, -1), "labels": ids.reshape(1, -1), "cu_seqlens": cu_seqlens},
    ):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "falcon"])
@pytest.mark.parametrize("half", [False, True], ids=["plain", "autocast"])
def test_gradients_do_not_depend_on_torchs_settings(kind, half):
    model, ids = model_of(kind), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=half and kind == "float32"):
        expected = trained(model, ids)
        for name in SETTINGS:
            with setting(name):
                found = trained(model, ids)
            for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                assert ours.dtype == theirs.dtype, (name, i)
                assert torch.equal(ours, theirs), (name, i)


@pytest.mark.parametrize("default", ["float16", "bfloat16", "float64"])
def test_a_model_made_under_another_default_dtype(default):
    """Its weights have that dtype, as `nn.Linear`'s do; what steers the decays is never in half."""
    config = mambakit.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    ids = tokens(2, 9)
    with setting(default):
        model = mambakit.MambaForCausalLM(config)
        dtype = getattr(torch, default)
        assert model.dtype == model.backbone.norm_f.weight.dtype == dtype
        for block in model.backbone.layers:
            m = block.mixer
            assert {t.dtype for t in (m.A_log, m.D, m.dt_proj.bias)} <= {torch.float32, torch.float64}
            steps = torch.nn.functional.softplus(m.dt_proj.bias.float())
            assert steps.min() > 0.0009
            assert steps.max() < 0.101
            assert len(steps.unique()) > len(steps) // 2, "drawn in float32: a half would leave few different steps"
        out = model.eval().generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    cache = model.backbone.new_cache(1)
    assert cache.ssm_states.dtype == (torch.float64 if default == "float64" else torch.float32)
    after = model.eval().generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out, after)
    if default == "bfloat16":
        assert native_serves(model, cache)
