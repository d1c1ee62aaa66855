"""Models behind accelerate's hooks: layers spread over devices, weights on the CPU or on a disk between uses."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from torch import nn

import mambakit
from mambakit.evaluation.likelihood import log_likelihoods
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.score import score_continuations
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.state import State, fingerprint
from mambakit.generation.stream import Sampling, Stream
from mambakit.modules import MambaCache
from mambakit.modules.layered import LayeredTensor
from tests.models.configurations import BASE, pair, tokens, worst

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

LEFT = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


def on_blocks(model, folder):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for block in model.backbone.layers:
        add_hook_to_module(block, AlignDevicesHook("cpu"))
    return model


def dispatched(model, folder):
    head = "lm_head" if hasattr(model, "lm_head") else "score"
    places = {"backbone.embeddings": "cpu", "backbone.layers.0": "disk", "backbone.norm_f": "cpu", head: "cpu"}
    places |= {f"backbone.layers.{i}": "cpu" for i in range(1, len(model.backbone.layers))}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "hooks on blocks": on_blocks,
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": dispatched,
}


@pytest.fixture(params=WAYS)
def placed(request, tmp_path):
    return lambda model: WAYS[request.param](copy.deepcopy(model), tempfile.mkdtemp(dir=tmp_path))


def states(cache):
    return cache.conv_states.cpu(), cache.ssm_states.cpu()


@torch.no_grad()
def require_the_same(model, plain, error=1e-5):
    """Forward with a new, a given and no cache; a mask, packed rows, hidden states, a loss, tuples."""
    device = model.device
    ids = tokens(2, 12)
    ours, theirs = (m(ids.to(m.device), use_cache=True, output_hidden_states=True) for m in (model, plain))
    assert worst(ours.logits.cpu(), theirs.logits.cpu()) < error
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert worst(a.cpu(), b.cpu()) < error
    found = []
    for each in (model, plain):
        given = each.backbone.new_cache(2)
        rows = ids.to(each.device)
        parts = [each(rows, attention_mask=LEFT.to(each.device), cache_params=given).logits]
        parts += [each(rows[:, t : t + 1], past_key_values=given).logits for t in range(3)]
        parts.append(each(rows[:, :5], cache_params=given, return_dict=False)[0])
        packed = torch.tensor([0, 3, 9], dtype=torch.int32, device=each.device)
        parts.append(each(rows[:1, :9], cu_seqlens=packed, cache_params=given).logits)
        again = each(rows[:, :2], cache_params=given)
        assert again.cache_params is given
        assert given.get_seq_length() == 12 + 3 + 5 + 9 + 2
        loss = each(rows, labels=rows, attention_mask=LEFT).loss
        found.append([*(p.cpu() for p in parts), *states(given), loss.cpu()])
    for a, b in zip(*found, strict=True):
        assert worst(a, b) < error
    assert model.device == device != torch.device("meta")


GENERATE = [
    {}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "seed": 1}, {"attention_mask": LEFT},
    {"prefill_chunk_size": 5}, {"use_cache": False}, {"output_scores": True, "return_dict_in_generate": True},
]  # fmt: skip


def require_the_same_texts(model, plain, error=1e-5):
    ids = tokens(2, 12)
    for options in GENERATE:
        ours, theirs = (m.generate(ids.to(m.device), max_new_tokens=5, **options) for m in (model, plain))
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours.cpu(), theirs.cpu()), options
        else:
            assert torch.equal(ours.sequences.cpu(), theirs.sequences.cpu())
            for a, b in zip(states(ours.past_key_values), states(theirs.past_key_values), strict=True):
                assert worst(a, b) < error
    ours, theirs = (State.read(m, ids) for m in (model, plain))
    sequences = [m.generate(**s.inputs(), max_new_tokens=5) for m, s in ((model, ours), (plain, theirs))]
    assert torch.equal(sequences[0].cpu(), sequences[1].cpu())


@pytest.mark.parametrize("name", ["untied", "plain", "falcon_odd", "odd_everything", "gelu"])
def test_forward_and_generate(name, placed):
    plain = pair(name)[0]
    model = placed(plain)
    require_the_same(model, plain)
    require_the_same_texts(model, plain)


def test_what_names_and_saves_a_model_reads_its_weights(placed, tmp_path):
    """A state is bound to the weights, wherever they lie; a tied head is not another weight."""
    for name in ("plain", "untied"):
        plain = pair(name)[0]
        model = placed(plain)
        assert fingerprint(model) == fingerprint(plain)
        State.read(model, tokens(1, 9)[0]).save(tmp_path / "state", model)
        State.load(tmp_path / "state", plain)
        model.save_original(tmp_path / name / "original")
        model.save_pretrained(tmp_path / name / "transformers")
        for format in ("original", "transformers"):
            again = mambakit.MambaForCausalLM.from_pretrained(tmp_path / name / format)
            for (key, ours), theirs in zip(again.state_dict().items(), plain.state_dict().values(), strict=True):
                assert torch.equal(ours, theirs), key


def test_half_weights(placed):
    """As without hooks: a time step's sum is not rounded to a half."""
    plain = pair("untied")[0].bfloat16()
    exact = copy.deepcopy(plain).float()
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = exact(ids).logits
        rounding = worst(plain(ids).logits, expected)
        assert worst(placed(plain)(ids).logits, expected) < 1.5 * rounding
        cache = plain.backbone.new_cache(2)
        model = placed(plain)
        assert worst(model(ids, cache_params=cache).logits, expected) < 1.5 * rounding


def test_classification(placed):
    plain = mambakit.MambaForSequenceClassification(mambakit.MambaConfig(**BASE, num_labels=3)).eval()
    model, ids = placed(plain), tokens(2, 12)
    with torch.no_grad():
        for options in ({}, {"attention_mask": LEFT}, {"labels": torch.tensor([0, 2])}):
            assert worst(model(ids, **options).logits, plain(ids, **options).logits) < 1e-5


class Numbers:
    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def readers(model) -> list[torch.Tensor]:
    torch.manual_seed(2)
    prompt = tokens(1, 40)[0].to(model.device)
    request = Request(prompt, Sampling(temperature=0.9, seed=1), max_new_tokens=5)
    Engine(model, 3, chunk_size=7).write([request, Request(prompt[:9], max_new_tokens=8)])
    found = [torch.tensor(request.tokens)]
    for kind in (Stream, SpeculativeStream):
        stream = kind(model, Numbers(), prompt, Sampling(temperature=0), max_new_tokens=5, chunk_size=7)
        list(stream)
        found.append(torch.tensor(stream.tokens))
    kept = PrefixCache(model, chunk_size=8)
    kept.read(prompt[:30])
    found += states(kept.read(prompt).cache)
    found += [s.log_probs.cpu() for s in score_continuations(model, prompt, [prompt[:3], prompt[:7]])]
    pairs = [(prompt[:9].tolist(), prompt[9:13].tolist()), (prompt[:30].tolist(), prompt[30:].tolist())]
    return [*found, torch.tensor([score.log_prob for score in log_likelihoods(model, pairs, batch_tokens=16)])]


def test_everything_else_that_reads_and_writes(placed):
    plain = pair("untied")[0]
    plain.generation_config.eos_token_id = None
    for a, b in zip(readers(placed(plain)), readers(plain), strict=True):
        assert worst(a, b) < 1e-5


def test_training_through_a_state(tmp_path):
    """Hooks on each block: gradients flow through the state, which stays the caller's."""
    plain = pair("untied")[0].train()
    found = []
    for model in (plain, on_blocks(copy.deepcopy(plain), tmp_path)):
        torch.manual_seed(0)
        ids, cache = tokens(2, 12), model.backbone.new_cache(2)
        for part in ids.chunk(3, 1):
            loss = model(part, cache_params=cache, labels=part).loss
        loss.backward()
        found.append([loss, *states(cache), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert worst(a, b) < 1e-6


@pytest.mark.parametrize("format", ["transformers", "original"])
def test_from_pretrained(format, tmp_path):
    plain = pair("plain")[0]
    save = plain.save_pretrained if format == "transformers" else plain.save_original
    save(tmp_path / "model")
    for places in (
        {"": "cpu"},
        {
            "backbone.embeddings": "cpu", "backbone.layers.0": "cpu", "backbone.layers.1": "disk",
            "backbone.norm_f": "cpu", "lm_head": "cpu",
        },
    ):  # fmt: skip
        model = mambakit.MambaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float32
        )
        require_the_same(model.eval(), plain)
        require_the_same_texts(model, plain)
    assert model.backbone.layers[1].mixer.in_proj.weight.is_meta


def gather_around_calls(model: nn.Module) -> None:
    """As DeepSpeed's ZeRO-3 does in inference: a module has its own parameters during its call, and nothing between
    calls."""

    def gather(module, *_):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.data = module.__dict__["_kept"][name]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.__dict__["_kept"] = {n: p.data for n, p in module._parameters.items() if p is not None}
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)


def test_partitioned_parameters():
    plain = pair("untied")[0]
    model = copy.deepcopy(plain)
    gather_around_calls(model)
    require_the_same(model, plain)
    require_the_same_texts(model, plain)


# -- states of several devices -----------------------------------------------------------------------------------------


def test_states_of_several_devices_are_those_of_one():
    """Every operation of a cache, on one tensor for each layer as on one of all layers."""
    config = mambakit.MambaConfig(**{**BASE, "num_hidden_layers": 3})
    found = []
    for device in ("cpu", ["cpu"] * 3):
        torch.manual_seed(0)
        cache = MambaCache(config, 4, device)
        assert isinstance(cache.ssm_states, LayeredTensor) == isinstance(device, list)
        for i in range(3):
            cache.ssm_states[i].normal_()
            cache.conv_states[i].normal_()
        cache.advance(5)
        kept = cache.clone()
        cache.copy_(kept, [0, 1], torch.tensor([2, 0]))
        cache.reset([3])
        forked = cache.select([2, 2, 0])
        forked.batch_repeat_interleave(2)
        forked.reorder_cache(torch.tensor([5, 0, 1]))
        other = kept.detach().to("cpu")
        empty = kept.clone()
        empty.reset()
        assert not empty.ssm_states.cpu().any()
        assert kept.ssm_states.cpu().any()
        assert kept.nbytes == cache.nbytes == 3 * 4 * 64 * (16 + 3) * 4
        assert "slots=4" in repr(cache)
        found.append([t.clone() for c in (cache, kept, forked, other, empty) for t in states(c)])
        assert torch.equal(cache.ssm_states, found[-1][1])
        cache.conv_states.copy_(kept.conv_states)
        cache.ssm_states.mul_(torch.full((4, 1, 1), 2.0))
        assert torch.equal(cache.conv_states.cpu(), kept.conv_states.cpu())
        found[-1] += states(cache)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match=r"\[:, slots\]"):
        MambaCache(config, 4, ["cpu"] * 3).ssm_states[0:2]
    with pytest.raises(ValueError, match="2 devices for 3 layers"):
        MambaCache(config, 4, ["cpu"] * 2)


def test_a_model_uses_states_of_several_devices(tmp_path):
    plain = pair("untied")[0]
    ids = tokens(2, 12)
    found = []
    for device in ("cpu", ["cpu"] * 2):
        cache = MambaCache(plain.config, 2, device)
        with torch.no_grad():
            logits = [
                plain(ids, attention_mask=LEFT, cache_params=cache).logits,
                plain(ids[:, :4], cache_params=cache).logits,
            ]
        sequences = plain.generate(ids[:, :1], cache_params=cache, max_new_tokens=4)
        for part in ids[:, :4].split(2, 1):
            plain(part, cache_params=cache)  # out of place, where gradients flow
        cache.save(tmp_path / "state")
        again = MambaCache.load(tmp_path / "state", plain.config)
        assert all(map(torch.equal, states(again), states(cache)))
        found.append([*logits, sequences, *states(cache)])
    for a, b in zip(*found, strict=True):
        assert worst(a, b) < 1e-6


def test_to_the_same_place_is_the_cache_itself():
    cache = MambaCache(mambakit.MambaConfig(**BASE), 2)
    assert cache.to("cpu") is cache
    assert cache.to(None) is cache
    assert cache.to("meta") is not cache


# -- on cards ----------------------------------------------------------------------------------------------------------


def halves(model, first, second) -> dict:
    layers = len(model.backbone.layers)
    places = {f"backbone.layers.{i}": first if i < layers // 2 else second for i in range(layers)}
    # A tied head has the embeddings' weight: both lie on one device.
    head = first if model.config.tie_word_embeddings else second
    return {"backbone.embeddings": first, **places, "backbone.norm_f": second, "lm_head": head}


@pytest.mark.cuda
@pytest.mark.parametrize("where", [("cpu", 0), (0, "cpu"), (0, "disk")])
@pytest.mark.parametrize("name", ["untied", "falcon_odd"])
def test_offload_from_a_gpu(name, where, tmp_path):
    plain = pair(name)[0]
    model = accelerate.dispatch_model(copy.deepcopy(plain), halves(plain, *where), main_device=0, offload_dir=tmp_path)
    plain = plain.to("cuda:0")  # random numbers are the device's
    assert {t.device.type for t in model.backbone.new_cache(1).ssm_states} == {"cuda"}
    require_the_same(model, plain, error=1e-4)
    require_the_same_texts(model, plain, error=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["untied", "plain", "falcon_odd"])
def test_two_gpus(name, tmp_path):
    """States on each layer's device, whoever made the map."""
    plain = pair(name)[0]
    plain.save_pretrained(tmp_path)
    models = [
        accelerate.dispatch_model(copy.deepcopy(plain), halves(plain, 0, 1)),
        type(plain).from_pretrained(tmp_path, device_map=halves(plain, 0, 1), dtype=torch.float32).eval(),
    ]
    plain = plain.to("cuda:0")
    for model in models:
        cache = model.backbone.new_cache(2)
        assert [t.device.index for t in cache.ssm_states] == [0, 1] if name != "falcon_odd" else [0, 1, 1]
        require_the_same(model, plain, error=1e-4)
        require_the_same_texts(model, plain, error=1e-4)
        ids = tokens(2, 12)
        single = MambaCache(model.config, 2, device="cuda:0")  # moves to its layers' devices at the first use
        with torch.no_grad():
            logits = [
                m(ids.to(m.device), cache_params=c).logits.cpu()
                for m, c in ((model, single), (plain, plain.backbone.new_cache(2)))
            ]
        assert worst(*logits) < 1e-4
        assert single.ssm_states[-1].device.index == 1
        for a, b in zip(readers(model), readers(plain), strict=True):
            assert worst(a.cpu(), b.cpu()) < 1e-4
