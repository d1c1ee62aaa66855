"""The specification of a state, the memory that is made from it, and files of earlier versions."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import mambakit
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.prefix_files import _digest
from mambakit.generation.state import State
from mambakit.modules import MambaCache, StateCache, StateSpec, StateTensor, new_cache
from tests.models.configurations import pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 5, "conv_kernel": 3}
HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("config", [mambakit.MambaConfig, mambakit.FalconMambaConfig])
@pytest.mark.parametrize(
    ("given", "conv", "ssm"),
    [(None, FLOAT, FLOAT), (HALF, HALF, FLOAT), ("torch.bfloat16", HALF, FLOAT), ("float64", DOUBLE, DOUBLE)],
)
def test_mambas(config, given, conv, ssm):
    spec = config(**FIELDS).state_spec(given)
    assert spec.dtype == conv
    assert spec.layers == ((StateTensor("conv", (64, 2), conv), StateTensor("ssm", (64, 5), ssm)),) * 3
    assert spec.nbytes == 3 * 64 * (2 * conv.itemsize + 5 * ssm.itemsize)
    assert [(s.key, s.layers) for s in spec.stacks] == [("conv_states", (0, 1, 2)), ("ssm_states", (0, 1, 2))]
    cache = new_cache(config(**FIELDS), 4, "cpu", given)
    assert type(cache) is MambaCache
    assert (cache.conv_states.shape, cache.ssm_states.shape) == ((3, 4, 64, 2), (3, 4, 64, 5))
    assert (cache.conv_states.dtype, cache.ssm_states.dtype) == (conv, ssm)
    assert cache.nbytes == 4 * spec.nbytes


def test_a_configuration_of_transformers_own_is_mambas():
    spec = MambaCache(transformers.MambaConfig(**FIELDS), 2).spec
    assert spec == mambakit.MambaConfig(**FIELDS).state_spec()


def test_layers_that_differ():
    small, large, none = StateTensor("s", (2,), FLOAT), StateTensor("s", (3, 2), FLOAT), ()
    spec = StateSpec(((small,), none, (large,), (small, StateTensor("n", (), torch.int64))), FLOAT)
    assert [(s.key, s.layers) for s in spec.stacks] == [("s_states", (0, 3)), ("s_states.2", (2,)), ("n_states", (3,))]
    assert spec.nbytes == 4 * (2 + 6 + 2) + 8
    cache = StateCache(spec, 3, "cpu")
    assert [[tuple(t.shape) for t in cache.layer(i)] for i in range(4)] == [[(3, 2)], [], [(3, 3, 2)], [(3, 2), (3,)]]
    cache.memory(3)[1][2] = 7
    cache.update(0, torch.ones(2, 2), rows=torch.tensor([1, -1]))
    assert cache.tensors()["s_states"][0].tolist() == [[0, 0], [1, 1], [0, 0]]
    kept = cache.layer(3, torch.tensor([2, -1]))
    assert kept[1].tolist() == [7, 0]
    assert cache.select([2, 2]).tensors()["n_states"].tolist() == [[7, 7]]
    other = StateCache(StateSpec((*spec.layers[:3], (small,)), FLOAT), 3, "cpu")
    with pytest.raises(ValueError, match=r"layer 3 has s \(2,\), not s \(2,\), n \(\)"):
        cache.load_(other)
    with pytest.raises(ValueError, match="2 layers, not 4"):
        cache.copy_(StateCache(StateSpec(((small,), none), FLOAT), 3, "cpu"), [0], [0])
    with pytest.raises(ValueError, match="source has 2 slots, not 3"):
        cache.load_(cache.select([0, 1]))
    with pytest.raises(ValueError, match=r"n_states is \(1, 3\) torch.float32, not \(1, 3\) torch.int64"):
        cache.fill_({**cache.tensors(), "n_states": torch.zeros(1, 3)}, 0)
    with pytest.raises(ValueError, match="give each an identifier of its own"):
        StateSpec(((small, large),), FLOAT)


def test_load_is_in_place_and_takes_no_gradient():
    cache = MambaCache(mambakit.MambaConfig(**FIELDS), 2, "cpu")
    source = cache.clone()
    ones = torch.ones(2, 64, 2, requires_grad=True)
    source.update(1, ones, torch.ones(2, 64, 5))
    source.advance(4)
    places = cache.addresses()
    cache.load_(source)
    assert cache.addresses() == places
    assert not cache.conv_states.requires_grad
    assert cache.conv_states[1].eq(1).all()
    assert not cache.conv_states[0].any()
    assert cache.get_seq_length() == 4
    assert source.conv_states.requires_grad


def test_a_mask_resets_slots_in_place_and_clears_what_is_no_number():
    cache = MambaCache(mambakit.MambaConfig(**FIELDS), 3, "cpu")
    cache.ssm_states.fill_(float("nan"))
    places = cache.addresses()
    cache.reset(torch.tensor([False, True, False]))
    assert cache.ssm_states.isnan().flatten(2).all(2).tolist() == [[True, False, True]] * 3
    assert not cache.ssm_states[:, 1].any()
    assert cache.addresses() == places
    with pytest.raises(ValueError, match=r"the mask has shape \(2,\); it must be \(3,\)"):
        cache.reset(torch.tensor([True, False]))


@pytest.mark.parametrize("slots", [[1, 2], [2, 0], torch.tensor([0, 2]), []])
def test_slots_are_copied_alike_as_a_range_and_by_index(slots):
    source, pool = (MambaCache(mambakit.MambaConfig(**FIELDS), n, "cpu") for n in (3, 4))
    for tensor in source.tensors().values():
        tensor.normal_()
    pool.copy_(source, slots, [*range(1, 1 + len(slots))])
    assert torch.equal(pool.ssm_states[:, 1 : 1 + len(slots)], source.ssm_states[:, torch.as_tensor(slots).long()])
    assert not pool.ssm_states[:, [0, *range(1 + len(slots), 4)]].any()
    for wrong in ([2, 3], [-1, 0], torch.tensor([3])):
        with pytest.raises(ValueError, match="reach outside the 3 rows"):
            pool.copy_(source, wrong, [0] * len(wrong))


# -- files of earlier versions -------------------------------------------------------------------------------------


@pytest.fixture
def known():
    """A model, a cache of two texts, and its tensors as they have always been called."""
    model = pair("odd_everything")[0]
    with torch.no_grad():
        cache = model(tokens(2, 7), use_cache=True).cache_params
    return model, cache, {"conv_states": cache.conv_states.contiguous(), "ssm_states": cache.ssm_states.contiguous()}


def test_a_cache(known, tmp_path):
    model, cache, tensors = known
    fields = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "state_size", "conv_kernel",
        "num_hidden_layers", "time_step_rank", "use_bias", "use_conv_bias", "hidden_act",
    )  # fmt: skip
    config = json.dumps({field: getattr(model.config, field) for field in fields})
    save_file(tensors, tmp_path / "cache", {"format": "mambakit.MambaCache/1", "config": config, "seen_tokens": "7"})
    for found in (MambaCache.load(tmp_path / "cache", model.config), State.load(tmp_path / "cache", model).cache):
        assert torch.equal(found.ssm_states, cache.ssm_states)
        assert torch.equal(found.conv_states, cache.conv_states)
        assert found.get_seq_length() == 7
    tensors["conv_states"] = tensors["conv_states"].bfloat16()
    save_file(tensors, tmp_path / "half", {"format": "mambakit.MambaCache/1", "config": config, "seen_tokens": "7"})
    assert MambaCache.load(tmp_path / "half", model.config).dtype == HALF
    tensors["conv_states"] = tensors["conv_states"].int()
    save_file(tensors, tmp_path / "integers", {"format": "mambakit.MambaCache/1", "config": config, "seen_tokens": "7"})
    with pytest.raises(ValueError, match="int32 is none of a model"):
        MambaCache.load(tmp_path / "integers", model.config)


def test_a_state(known, tmp_path):
    model, cache, tensors = known
    metadata = {"format": "mambakit.State/1", "fingerprint": fingerprint(model), "seen_tokens": "7"}
    save_file({**tensors, "pending": torch.tensor([[1], [2]])}, tmp_path / "state", metadata)
    found = State.load(tmp_path / "state", model)
    assert torch.equal(found.cache.ssm_states, cache.ssm_states)
    assert found.pending.tolist() == [[1], [2]]


def test_the_fingerprint_of_a_model_is_what_it_was():
    """SHA-256 of five fields of the configuration and of every weight: states in files and keys of prefixes name it."""
    import hashlib

    model = pair("falcon_eps")[0]
    five = ("model_type", "hidden_act", "layer_norm_epsilon", "residual_in_fp32", "mixer_rms_eps")
    total = hashlib.sha256(json.dumps({f: getattr(model.config, f, None) for f in five}, sort_keys=True).encode())
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        one = hashlib.sha256(f"{tuple(weights[name].shape)}:".encode())
        one.update(weights[name].detach().numpy().tobytes())
        total.update(f"{name}:".encode() + one.digest())
    assert fingerprint(model) == total.hexdigest()


def test_a_prefix_cache(known, tmp_path):
    model, _, _ = known
    ids = tokens(1, 9)[0]
    cache = PrefixCache(model, folder=tmp_path)
    expected = cache.read(ids).cache
    files = list(tmp_path.rglob("*.safetensors"))
    key = files[-1].parent.name, *files[-1].stem.split("-")
    tensors = {name: t.contiguous() for name, t in expected.tensors().items()}
    assert set(tensors) == {"conv_states", "ssm_states"}
    metadata = {"format": "mambakit.PrefixCache/2", "key": "-".join(key), "sha256": _digest(tensors)}
    save_file(tensors, files[-1], metadata)
    again = PrefixCache(model, folder=tmp_path)
    assert torch.equal(again.read(ids).cache.ssm_states, expected.ssm_states)
    assert again.statistics.disk_hits == 1
