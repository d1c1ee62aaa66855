"""The registry: the model's own logits and states by whichever decoder, one reason for each that does not serve."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mambakit.decoding import registry
from mambakit.decoding.registry import token_step
from mambakit.models import generate_tokens
from mambakit.ops._backends import native
from tests.decoding.eager_graph import decode_by, native_serves
from tests.models.configurations import NAMES, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
NATIVE = {"plain", "use_bias", "no_conv_bias", "conv_kernel_3", "conv_kernel_2_bias", "state_size_8", "state_size_64"}
NATIVE |= {"expand_3", "time_step_rank_7", "untied", "odd_hidden_size", "odd_everything", "epsilon", "time_step_init"}
NATIVE |= {"falcon", "falcon_eps", "falcon_odd"}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_models_numbers(name):
    model = pair(name)[0]
    ids = tokens(3, 12)
    cache = model(ids[:, :6], use_cache=True).cache_params
    whole = model(ids, use_cache=True)
    if native.describe()["isa"] is not None:
        assert native_serves(model, cache) == (name in NATIVE)
    step = token_step(model, cache)
    for t in range(6, 12):
        assert worst(step(ids[:, t]), whole.logits[:, t]) < 1e-5
    assert worst(cache.ssm_states, whole.cache_params.ssm_states) < 1e-5
    assert worst(cache.conv_states, whole.cache_params.conv_states) < 1e-5
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_bfloat16_weights_and_a_row_alone():
    model = pair("plain")[0].bfloat16()
    ids = tokens(4, 5)
    logits = []
    for some in (ids, ids[2:3]):
        cache = model.backbone.new_cache(some.shape[0])
        step = token_step(model, cache)
        logits.append([step(some[:, t]) for t in range(5)][-1])
    exact = model.double()(ids).logits[:, -1]
    assert worst(logits[0], exact) < 2e-2
    if native.describe()["isa"] is not None:
        assert torch.equal(logits[0][2], logits[1][0]), "a row does not depend on its neighbours"


def test_adapters_are_not_passed_by():
    peft = pytest.importorskip("peft")
    model = pair("plain")[0]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["x_proj"]), model.backbone.layers)
    assert not native_serves(model, model.backbone.new_cache(1))


@torch.no_grad()
def test_listeners_are_not_passed_by():
    model = pair("plain")[0]
    handle = model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    assert not native_serves(model, model.backbone.new_cache(1))
    handle.remove()


@pytest.mark.parametrize("b", [1, 3])
def test_generate_takes_the_native_step(b, monkeypatch):
    if native.describe()["isa"] is None:
        pytest.skip("no native library")
    model = pair("plain")[0]
    ids = tokens(b, 5)
    made = []
    kind, *others = registry.DECODERS
    counted = dataclasses.replace(kind, make=lambda *a: made.append(1) or kind.make(*a))
    monkeypatch.setattr(registry, "DECODERS", (counted, *others))
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    fast = model.generate(ids, **options)
    assert made == [1], "one step is made for the whole call"
    decode_by("forward", monkeypatch)
    plain = model.generate(ids, **options)
    assert torch.equal(fast.sequences, plain.sequences)
    assert worst(torch.stack(fast.logits), torch.stack(plain.logits)) < 1e-5
    assert worst(fast.past_key_values.ssm_states, plain.past_key_values.ssm_states) < 1e-5
    assert fast.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.parametrize("name", ["plain", "untied", "falcon"])
@pytest.mark.parametrize("b", [1, 4])
def test_the_loop_of_steps_alone_is_transformers_loop(name, b, monkeypatch):
    """Tokens, padding after a row's end, the point where all have ended, and the state that is left."""
    model = pair(name)[0]
    ids = tokens(b, 5)
    free = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    taken = []
    loop = generate_tokens.write_tokens
    monkeypatch.setattr(generate_tokens, "write_tokens", lambda *a: taken.append(1) or loop(*a))
    for ends in (None, [int(free[0, 7])], [int(t) for t in free[:, 9]]):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends, "pad_token_id": 1}
        options["return_dict_in_generate"] = True
        ours = model.generate(ids, **options)
        theirs = model.generate(ids, logits_processor=[lambda _, scores: scores], **options)  # somebody looks
        assert torch.equal(ours.sequences, theirs.sequences)
        assert worst(ours.past_key_values.ssm_states, theirs.past_key_values.ssm_states) < 1e-5
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    assert len(taken) == 3
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    handle.remove()
    assert len(seen) == 4, "who listens to the model hears every token"


REASONS = {  # configuration: what the native library's reason says
    "gelu": "activation",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_that_does_not_serve_has_a_reason(name):
    model = pair(name)[0]
    rows = registry.table_of(model, 3)
    assert [row.decoder for row in rows] == [kind.name for kind in registry.DECODERS]
    assert sum(row.serves for row in rows) == 1
    serving = next(row for row in rows if row.serves)
    assert serving.decoder == registry.choose(model, 3).name
    for row in rows[: rows.index(serving)]:
        assert row.reason
        assert registry.describe(row) == row.reason
    assert registry.describe(serving) == "serves"
    if native.describe()["isa"] is not None and name in REASONS:
        assert REASONS[name] in rows[0].reason


def test_reasons_name_what_is_wrong():
    if native.describe()["isa"] is None:
        pytest.skip("no native library")
    model = pair("plain")[0]
    why_not = registry.DECODERS[0].why_not
    assert why_not(model, 3) is None
    assert why_not(model, 17) is None
    assert why_not(model, 33) == "33 rows of float32 weights; of those it serves 1 to 32"
    assert why_not(model.bfloat16(), 1000) is None
    assert why_not(pair("plain")[0], 0) == "0 rows; it serves 1 or more"
    model = pair("plain")[0]
    assert "float64" in why_not(pair("plain")[0].double(), 1)
    assert "another dtype" in why_not(model, 1, states=pair("plain")[0].double().backbone.new_cache(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(model, 1) == "autocast is on"
    hook = model.register_forward_hook(lambda *_: None)
    assert "hook" in why_not(model, 1)
    assert why_not(model, 1, called=True) is None, "within its forward its own hooks have been called"
    hook.remove()
    model.backbone.layers[1].mixer.layer_idx = 0
    assert why_not(model, 1) == "layer 1: its mixer is layer 0's"


def test_the_first_that_serves_is_chosen(monkeypatch):
    model = pair("gelu")[0]
    assert registry.choose(model, 2) is registry.FORWARD
    mine = registry.DecoderKind("mine", lambda *_, **__: None, registry.ForwardDecoder)
    monkeypatch.setattr(registry, "DECODERS", (*registry.DECODERS[:-1], mine, registry.FORWARD))
    assert registry.choose(model, 2) is mine
    assert [registry.describe(row) for row in registry.table_of(model, 2)[-2:]] == [
        "serves",
        "could serve, comes after",
    ]


def test_a_markdown_table_of_what_serves():
    text = registry.as_markdown({"gelu": pair("gelu")[0], "plain": pair("plain")[0]}, rows=(1, 33))
    lines = text.splitlines()
    assert lines[0] == "| model | 1 row | 33 rows |"
    assert lines[2] == "| gelu | forward | forward |"
    assert lines[3].endswith("| forward |")
