"""The state's three names (`cache`, `cache_params`, `past_key_values`) mean one thing, in arguments and results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mambakit
from mambakit.models.outputs import CACHE_NAMES, MambaCausalLMOutput, MambaOutput, MambaSequenceClassifierOutput
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["base", "causal", "classifier", "falcon"]


def made(kind: str):
    if kind == "falcon":
        return pair("falcon")[0]
    causal = pair("plain")[0]
    if kind == "classifier":
        return mambakit.MambaForSequenceClassification(causal.config).eval()
    return causal if kind == "causal" else causal.backbone


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_name_reads_the_state_of_an_output(kind):
    out = made(kind)(tokens(2, 5), use_cache=True)
    assert isinstance(out.cache, mambakit.MambaCache)
    for name in CACHE_NAMES:
        assert getattr(out, name) is out[name] is out.get(name) is out.cache
        assert name in out
    assert out.get("nothing", 3) == 3
    assert "nothing" not in out
    assert [value for value in out.to_tuple() if value is out.cache] == [out.cache]
    without = made(kind)(tokens(2, 5), use_cache=False)
    for name in CACHE_NAMES:
        assert getattr(without, name) is None
        assert without.get(name) is None
        assert name not in without


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_every_name_gives_the_state_to_a_forward(kind, name):
    model, ids = made(kind), tokens(2, 9)
    whole = model(ids)[0]
    cache = model(ids[:, :6], use_cache=True).cache
    out = model(ids[:, 6:], **{name: cache})
    assert out.cache is cache
    part = out[0]
    assert worst(part, whole if kind == "classifier" else whole[:, 6:]) < 1e-5
    other = cache.clone()
    for second in set(CACHE_NAMES) - {name}:
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids[:, 6:], **{name: cache, second: other})
        model(ids[:, 6:], **{name: cache, second: cache})


@pytest.mark.parametrize("output", [MambaOutput, MambaCausalLMOutput, MambaSequenceClassifierOutput])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_constructor_assignment_copies(output, name):
    state = mambakit.MambaCache(pair("plain")[0].config, 1)
    first = {"logits" if "logits" in output.__dataclass_fields__ else "last_hidden_state": torch.ones(1)}
    out = output(**first, **{name: state})
    assert out.cache is state
    assert len(out.to_tuple()) == 2
    for again in (copy.copy(out), type(out)(**dict(out.items()))):
        assert again[name] is state
    assert isinstance(pickle.loads(pickle.dumps(out))[name], mambakit.MambaCache)
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).cache is state
    other = mambakit.MambaCache(pair("plain")[0].config, 2)
    setattr(out, name, other)
    assert out.cache is other is out["cache"]
    out[name] = state
    assert out.cache is state is out["cache"]


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "seed": 1}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "seed": 1},
    {"output_scores": True}, {"repetition_penalty": 1.3}, {"use_cache": True, "prefill_chunk_size": 2},
])  # fmt: skip
def test_generate_takes_and_returns_every_name(name, options):
    model = pair("plain")[0]
    ids = tokens(2, 9)
    common = {"max_new_tokens": 5, "eos_token_id": None, "return_dict_in_generate": True, **options}
    whole = model.generate(ids, **common)
    with torch.no_grad():
        state = model(ids[:, :6], use_cache=True).cache
    out = model.generate(ids[:, 6:], attention_mask=torch.ones_like(ids), **{name: state}, **common)
    assert torch.equal(out.sequences[:, 3:], whole.sequences[:, 9:])
    for other in CACHE_NAMES:
        assert isinstance(getattr(out, other), mambakit.MambaCache)
        assert getattr(out, other) is getattr(out, name)
    for second in set(CACHE_NAMES) - {name}:
        with pytest.raises(ValueError, match="two names of one argument"):
            model.generate(ids[:, 6:], **{name: state, second: state.clone()}, **common)


def test_embeddings_as_the_prompt():
    model = pair("plain")[0]
    ids = tokens(2, 6)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=4, eos_token_id=None)[:, 6:])
    assert out.cache is out.cache_params is out.past_key_values


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_compiled(name):
    model, ids = pair("plain")[0], tokens(1, 6)

    def second(ids, cache):
        return model(ids, **{name: cache})[name].ssm_states.sum() + model(ids, **{name: cache}).logits.sum()

    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        expected = second(ids, cache.clone())
        found = torch.compile(second, backend="eager")(ids, cache.clone())
    assert torch.allclose(found, expected, rtol=1e-5)
