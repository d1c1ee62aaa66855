"""States in bfloat16, an option: what holds them, what refuses them, what they cost in accuracy."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.assets import default_model_path
from mambakit.decoding.registry import choose, table_of
from mambakit.generation.engine import Engine, Request
from mambakit.modules import MambaCache
from mambakit.ops import selective_scan_
from tests.models.configurations import pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def narrow(name="plain"):
    """A pair of the same weights: float32 states, and bfloat16 ones."""
    wide = pair(name)[0].eval()
    other = pair(name)[0].eval()
    other.load_state_dict(wide.state_dict())
    other.config.ssm_state_dtype = "bfloat16"
    return wide, other


def test_it_is_never_the_default():
    config = mambakit.MambaConfig()
    assert config.ssm_state_dtype is None
    assert "ssm_state_dtype" not in config.to_dict()
    assert config.state_spec(torch.bfloat16).layers[0][1].dtype == torch.float32
    half = mambakit.MambaConfig(ssm_state_dtype="bfloat16")
    assert half.to_dict()["ssm_state_dtype"] == "bfloat16"
    assert half.state_spec(torch.bfloat16).nbytes < 0.6 * config.state_spec(torch.bfloat16).nbytes
    with pytest.raises(ValueError, match="ssm_state_dtype is 'float8'; use None"):
        mambakit.MambaConfig(ssm_state_dtype="float8")


@pytest.mark.parametrize("name", ["plain", "falcon", "odd_everything"])
@torch.no_grad()
def test_every_way_through_the_layers(name):
    """Prompts in parts, padded and packed rows, steps: within bfloat16's rounding of float32 states."""
    wide, model = narrow(name)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for options in ({}, {"attention_mask": mask}):
        out, expected = (m(ids, use_cache=True, **options) for m in (model, wide))
        assert out.cache_params.ssm_states.dtype == torch.bfloat16
        assert torch.allclose(out.logits, expected.logits, atol=1e-5), "one call: the state is rounded at its end"
        assert torch.allclose(
            out.cache_params.ssm_states.float(), expected.cache_params.ssm_states, rtol=2**-8, atol=1e-6
        )
    cache, exact = (m(ids[:, :5], use_cache=True).cache_params for m in (model, wide))
    for part in (ids[:, 5:9], ids[:, 9:10], ids[:, 10:]):
        mine, own = model(part, cache_params=cache).logits, wide(part, cache_params=exact).logits
        assert (mine - own).norm() < 0.02 * own.norm()
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    mine, own = (m(ids[:1, :7], position_ids=packed).logits for m in (model, wide))
    assert torch.allclose(mine, own, atol=1e-5)
    assert model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).shape == (3, 26)
    requests = Engine(model, 2).write([Request(row, max_new_tokens=5, keep_state=True) for row in ids])
    assert all(r.final_state.ssm_states.dtype == torch.bfloat16 for r in requests)


def test_gradients_flow_through_the_state():
    model = narrow()[1]
    cache = model.backbone.new_cache(2)
    model(tokens(2, 4), cache_params=cache).logits.sum().backward()
    model.zero_grad()
    cache = cache.detach()
    model(tokens(2, 4), cache_params=cache).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_files_of_one_are_read_by_the_other(tmp_path):
    wide, model = narrow()
    ids = tokens(2, 9)
    for writer, reader in ((wide, model), (model, wide), (model, model)):
        cache = writer(ids, use_cache=True).cache_params
        cache.save(tmp_path / "state.safetensors")
        read = MambaCache.load(tmp_path / "state.safetensors", reader.config)
        assert read.ssm_states.dtype == reader.backbone.new_cache(1).ssm_states.dtype
        assert torch.allclose(read.ssm_states.float(), cache.ssm_states.float(), rtol=2**-8, atol=1e-7)
        reader(ids[:, :1], cache_params=read)


def test_a_saved_model_keeps_the_option(tmp_path):
    model = narrow()[1]
    model.save_pretrained(tmp_path)
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.backbone.new_cache(1).ssm_states.dtype == torch.bfloat16
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, ssm_state_dtype="float32")
    assert again.backbone.new_cache(1).ssm_states.dtype == torch.float32


def test_decoders_that_do_not_read_them_say_so():
    model = narrow()[1]
    assert choose(model, 2).name == "forward"
    assert any("states of bfloat16 (ssm_state_dtype); it reads float32" in row.reason for row in table_of(model, 2))


@torch.no_grad()
def test_the_op_rounds_once():
    """Slots that are not written keep their bits."""
    state = torch.randn(4, 6, 5).bfloat16()
    before, x = state.clone(), torch.randn(2, 3, 6)
    delta, B, C = torch.rand(2, 3, 6), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    A, wide = -torch.rand(6, 5), state.float()
    slots = torch.tensor([2, 0], dtype=torch.int32)
    y, _ = selective_scan_(x, delta, A, B, C, state=state, slot_indices=slots)
    own, _ = selective_scan_(x, delta, A, B, C, state=wide, slot_indices=slots)
    assert torch.equal(y, own)
    assert torch.equal(state, wide.bfloat16())
    assert torch.equal(state[[1, 3]], before[[1, 3]])


@torch.no_grad()
def test_the_error_on_a_text():
    """The embedded model, a token at a time: the likelihood of a text changes by less than a hundredth of a nat."""
    path = default_model_path()
    wide, half = (
        mambakit.AutoModelForCausalLM.from_pretrained(path, dtype="float32", ssm_state_dtype=kind).eval()
        for kind in (None, "bfloat16")
    )
    text = "The old man looked at the sea and said that the wind would turn before the morning came. " * 2
    ids = mambakit.AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    caches, nll = [m.backbone.new_cache(1) for m in (wide, half)], [0.0, 0.0]
    for i in range(ids.shape[1] - 1):
        for j, model in enumerate((wide, half)):
            log_probs = model(ids[:, i : i + 1], cache_params=caches[j]).logits[0, 0].log_softmax(-1)
            nll[j] -= float(log_probs[ids[0, i + 1]])
    count = ids.shape[1] - 1
    assert 0 < abs(nll[0] - nll[1]) / count < 0.01
    error = (caches[0].ssm_states - caches[1].ssm_states.float()).norm() / caches[0].ssm_states.norm()
    assert error < 0.02
