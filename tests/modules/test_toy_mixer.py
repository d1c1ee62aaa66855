"""An architecture that the library has never seen goes through all that is done with states, by its specification."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import GenerationMixin

import mambakit
from mambakit.decoding.registry import verifier
from mambakit.evaluation.likelihood import log_likelihoods
from mambakit.generation.engine import Engine, Request
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.score import score_continuations, score_text
from mambakit.generation.speculative import PromptLookup, SpeculativeStream
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream
from mambakit.modules import MambaCache, StateCache
from mambakit.modules.layered import LayeredTensor
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import TrainingStep
from tests.models.configurations import tokens, worst
from tests.models.tiny import TEXT, save_tiny
from tests.modules.toy_mixer import CONFIGS, ToyMixer, toy

pytestmark = pytest.mark.filterwarnings("ignore")
TIGHT = 1e-5


@pytest.fixture(params=CONFIGS)
def model(request):
    return toy(request.param)


def same(a, b) -> bool:
    return all(torch.equal(t.cpu(), b.tensors()[key].cpu()) for key, t in a.tensors().items())


def close(a, b) -> bool:
    return all(worst(t.cpu(), b.tensors()[key].cpu()) < TIGHT for key, t in a.tensors().items())


# -- forward -------------------------------------------------------------------------------------------------------


def test_the_blocks_are_what_the_configuration_names(model):
    kinds = [type(block.mixer).__name__ for block in model.backbone.layers]
    assert kinds == {"toy": ["ToyMixer"] * 3, "hybrid": ["ToyMixer", "MambaMixer", "ToyMixer"]}[model.config.model_type]
    cache = model.backbone.new_cache(2)
    assert type(cache) is StateCache
    assert cache.tensors()["count_states"].dtype == torch.int64
    assert cache.tensors()["memory_states"].shape == (kinds.count("ToyMixer"), 2, 15)


@pytest.mark.parametrize("grad", [False, True])
def test_whole_segmented_packed_and_padded(model, grad):
    ids = tokens(2, 11)
    with torch.set_grad_enabled(grad):
        whole = model(ids, use_cache=True)
        cache, parts = model.backbone.new_cache(2), []
        for start, stop in pairwise([0, 1, 4, 9, 11]):
            parts.append(model(ids[:, start:stop], cache_params=cache).logits)
        assert worst(torch.cat(parts, 1), whole.logits) < TIGHT
        assert close(cache, whole.cache_params)
        assert cache.tensors()["count_states"].eq(11).all()
        lengths = torch.tensor([0, 11, 22], dtype=torch.int32)
        packed = model(ids.view(1, -1), cu_seqlens=lengths, use_cache=True)
        assert worst(packed.logits.view_as(whole.logits), whole.logits) < TIGHT
        assert close(packed.cache_params, whole.cache_params)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        padded = model(ids, attention_mask=mask, use_cache=True)
        alone = model(ids[:1, 3:], use_cache=True)
        assert worst(padded.logits[:1, 3:], alone.logits) < TIGHT
        assert close(padded.cache_params.select([0]), alone.cache_params)
        after = model(ids[:, :2], cache_params=padded.cache_params).logits
        assert worst(after[:1], model(ids[:1, :2], cache_params=alone.cache_params).logits) < TIGHT


def test_gradients_flow_through_the_state(model):
    model.train()
    ids = tokens(2, 9)
    model(ids).logits[:, 4:].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = model.backbone.new_cache(2)
    model(ids[:, :4], cache_params=cache)
    model(ids[:, 4:], cache_params=cache).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert worst(parameter.grad, expected[name]) < 1e-4, name


# -- tokens --------------------------------------------------------------------------------------------------------

CHOICES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_generate_has_the_tokens_of_transformers_loop(model, choice):
    ids, options = tokens(3, 7), {"max_new_tokens": 12, **CHOICES[choice]}
    plain = copy.deepcopy(model)
    plain.__class__ = type("Plain", (type(model),), {"_sample": GenerationMixin._sample})
    torch.manual_seed(1)
    ours = model.generate(ids, **options)
    for use_cache in (True, False):
        torch.manual_seed(1)
        assert torch.equal(ours, plain.generate(ids, use_cache=use_cache, **options))


def test_generate_continues_a_state_and_leaves_one(model):
    ids = tokens(2, 9)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)
    first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, cache_params=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert torch.equal(rest, whole)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=4), whole)


def test_the_engine(model):
    prompts = [tokens(1, 3 + 4 * i)[0] for i in range(5)]
    greedy = [Request(p, Sampling(temperature=0), 4 + i, keep_state=True) for i, p in enumerate(prompts)]
    for request in Engine(model, 2, chunk_size=4).write(greedy):
        alone = model.generate(request.prompt_ids[None], max_new_tokens=request.max_new_tokens + 3, do_sample=False)
        prompt, end = len(request.prompt_ids), len(request.prompt_ids) + request.max_new_tokens
        assert request.tokens == alone[0, prompt:end].tolist()
        assert close(request.final_state, State.read(model, alone[:, :end]).cache)
        last = torch.tensor(request.tokens[-1:])
        further = Request(last, Sampling(temperature=0), max_new_tokens=3, state=request.final_state)
        assert Engine(model, 2).write([further])[0].tokens == alone[0, end:].tolist()

    def sampled(i):
        return Request(prompts[i], Sampling(temperature=0.9, seed=i), max_new_tokens=8)

    together = Engine(model, 5).write(sampled(i) for i in range(5))
    for i, request in enumerate(together):
        assert request.tokens == Engine(model, 1).write([sampled(i)])[0].tokens


def test_streams_and_speculation(tmp_path):
    save_tiny(tmp_path)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(tmp_path)
    for name in CONFIGS:
        model = toy(name, vocab_size=304)
        ids = tokenizer(TEXT[:60], return_tensors="pt").input_ids[0]
        expected = model.generate(ids[None], max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        stream = Stream(model, tokenizer, ids, Sampling(temperature=0), 12, chunk_size=5)
        assert "".join(stream) == tokenizer.decode(expected, skip_special_tokens=True)
        assert stream.tokens == expected
        guessed = SpeculativeStream(model, tokenizer, ids, Sampling(temperature=0), 12, drafter=PromptLookup())
        assert "".join(guessed) == stream.text
        state = State.read(model, ids)
        again = Stream(model, tokenizer, **state.prompt(), sampling=Sampling(temperature=0), max_new_tokens=12)
        assert "".join(again) == stream.text
        assert score_text(model, tokenizer, TEXT[:80], chunk_size=7).perplexity == pytest.approx(
            score_text(model, tokenizer, TEXT[:80]).perplexity, rel=1e-5
        )


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_draft_tokens_that_are_not_kept_leave_no_trace(model, kept):
    prompt, drafts = tokens(1, 6), tokens(1, 4)
    cache, expected = model.backbone.new_cache(1), model.backbone.new_cache(1)
    with torch.no_grad():
        model(prompt, cache_params=cache)
        verify = verifier(model, cache, 4)
        logits = verify(drafts)[0]
        assert worst(logits, model(torch.cat([prompt, drafts], 1)).logits[0, 6:]) < TIGHT
        verify.commit([kept])
        model(torch.cat([prompt, drafts[:, :kept]], 1), cache_params=expected)
    assert close(cache, expected)
    assert cache.get_seq_length() == 6 + kept


# -- states --------------------------------------------------------------------------------------------------------


def test_states_are_read_forked_extended_and_saved(model, tmp_path):
    prompts = [tokens(1, 9)[0], tokens(1, 4)[0]]
    state = State.read(model, prompts)
    for row, prompt in enumerate(prompts):
        alone = State.read(model, prompt)
        assert close(state.select([row]).cache, alone.cache)
        assert alone.cache.tensors()["count_states"].eq(len(prompt) - 1).all()
    stacked = State.stack([State.read(model, p) for p in prompts])
    assert close(stacked.cache, state.cache)
    state.save(tmp_path / "state", model)
    again = State.load(tmp_path / "state", model)
    assert same(again.cache, state.cache)
    assert again.cache.get_seq_length() == state.cache.get_seq_length()
    forked = again.fork(2)
    texts = model.generate(**forked.inputs(), max_new_tokens=5, do_sample=False)
    assert torch.equal(texts[0], texts[1])
    expected = model.generate(prompts[0][None], max_new_tokens=5, do_sample=False)
    assert torch.equal(texts[0, 1:], expected[0, len(prompts[0]) :])
    more = tokens(1, 3)[0]
    longer = state.extend(model, [more, more])
    assert close(longer.select([0]).cache, State.read(model, torch.cat([prompts[0], more])).cache)


def test_another_models_state_is_refused_by_what_does_not_fit(model, tmp_path):
    cache = State.read(model, tokens(1, 5)).cache
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="hidden_size: file 12, model 14"):
        StateCache.load(
            tmp_path / "cache", CONFIGS[model.config.model_type](**{**model.config.to_dict(), "hidden_size": 14})
        )
    with pytest.raises(ValueError, match="expand: file 2, model 3"):
        StateCache.load(tmp_path / "cache", CONFIGS[model.config.model_type](**{**model.config.to_dict(), "expand": 3}))
    plain = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=61, hidden_size=12, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"layer 0 has conv \(24, 3\), ssm \(24, 16\), not memory \(15,\), count \(\)"):
        cache.load_(plain.backbone.new_cache(1))
    with pytest.raises(ValueError, match="MambaCache holds conv and ssm alike in every layer"):
        MambaCache(model.config, 1)
    with pytest.raises(ValueError, match="count_states is missing"):
        cache.fill_({k: t for k, t in cache.tensors().items() if k != "count_states"}, 4)
    with pytest.raises(ValueError, match="layer 0 was given 1 state tensors; it has 2: memory, count"):
        cache.update(0, torch.zeros(1, 15))


def test_the_cache_in_a_file(model, tmp_path):
    ids, more = tokens(2, 8), tokens(2, 5)
    cache = model(ids, use_cache=True).cache_params
    cache.save(tmp_path / "cache")
    loaded = type(cache).load(tmp_path / "cache", model.config)
    assert same(loaded, cache)
    assert loaded.get_seq_length() == 8
    with torch.no_grad():
        assert torch.equal(model(more, cache_params=loaded).logits, model(more, cache_params=cache.clone()).logits)
    unread = State.load(tmp_path / "cache", model)
    assert same(unread.cache, cache)
    assert unread.pending.shape == (2, 0)


def test_slots(model):
    """Snapshots, forks, pools, masks: whatever the tensors are."""
    ids = tokens(3, 6)
    cache = State.read(model, ids).cache
    kept, places = cache.snapshot(), cache.addresses()
    with torch.no_grad():
        model(ids, cache_params=cache)
    assert not same(cache, kept)
    cache.restore_(kept)
    assert same(cache, kept)
    assert cache.addresses() == places, "in place"
    assert cache.get_seq_length() == kept.get_seq_length()
    pool = cache.empty_like(5)
    pool.copy_(cache, [2, 0], [4, 1])
    assert same(pool.select([4, 1]), cache.select([2, 0]))
    pool.reset(torch.tensor([True, False, False, False, True]))
    assert same(pool.select([4, 1]), cache.empty_like(1).select([0, 0]).copy_(cache, [0], [1]))
    pool.reset([1])
    assert same(pool, cache.empty_like(5))
    cache.batch_repeat_interleave(2)
    assert same(cache, kept.select([0, 0, 1, 1, 2, 2]))
    cache.reorder_cache(torch.tensor([5, 0]))
    assert same(cache, kept.select([2, 0]))
    assert cache.nbytes == 2 * model.config.state_spec().nbytes
    assert same(cache.detach().to("cpu"), cache)


def test_layers_on_devices_of_their_own(model):
    """A list of devices makes memory for each layer apart, also where layers differ."""
    single, apart = (StateCache(model.config.state_spec(), 2, device) for device in ("cpu", ["cpu"] * 3))
    assert all(isinstance(t, LayeredTensor) for t in apart.tensors().values())
    ids = tokens(2, 7)
    with torch.no_grad():
        for cache in (single, apart):
            model(ids, cache_params=cache)
            model(ids, cache_params=cache, attention_mask=(torch.arange(7) > 2).long().expand(2, 7))
    assert close(apart, single)
    for change in (lambda c: c.select([1, 0]), lambda c: c.clone(), lambda c: c.to("cpu")):
        assert close(change(apart), change(single))
    assert close(apart.empty_like(2).copy_(apart, [0], [1]), single.empty_like(2).copy_(single, [0], [1]))


@pytest.mark.parametrize("folder", [False, True])
def test_the_prefix_cache(model, tmp_path, folder):
    ids = tokens(1, 30)[0]
    cache = PrefixCache(model, chunk_size=8, folder=tmp_path if folder else None)
    first = cache.read(ids)
    if folder:
        cache = PrefixCache(model, chunk_size=8, folder=tmp_path)
    again = cache.read(ids)
    assert same(again.cache, first.cache)
    assert cache.statistics.tokens_saved == 29
    assert cache.statistics.disk_hits == int(folder)
    assert close(first.cache, State.read(model, ids).cache)


def test_scores(model):
    prefix, continuations = tokens(1, 10)[0], [tokens(1, n)[0] for n in (1, 6, 3)]
    pairs = [(prefix.tolist(), c.tolist()) for c in continuations]
    found = score_continuations(model, prefix, continuations, chunk_size=4)
    packed, chunked = log_likelihoods(model, pairs), log_likelihoods(model, pairs, batch_tokens=5)
    for i, continuation in enumerate(continuations):
        with torch.no_grad():
            log_probs = model(torch.cat([prefix, continuation])[None]).logits[0, 9:-1].log_softmax(-1)
        expected = float(log_probs.gather(1, continuation[:, None]).sum())
        for likelihood in (packed[i], chunked[i]):
            assert likelihood.log_prob == pytest.approx(expected, rel=1e-5)
        assert found[i].log_prob == pytest.approx(expected, rel=1e-5)


def test_training_carries_the_state(model):
    """Rows in a row are one long row; a checkpoint has the states; a mask makes rows start anew."""
    ids, begins = tokens(2, 13), torch.zeros(2, 13, dtype=torch.bool)

    def made():
        own = copy.deepcopy(model).train()
        return TrainingStep(own, make_optimizer(own, 0.0, (0.9, 0.95), 0.0), 1.0, "float32", False, carry_rows=2)

    step = made()
    step.run(ids[:, :7], begins[:, :7])
    with torch.no_grad():
        expected = model(ids[:, :6], use_cache=True).cache_params
    assert close(step.carried[0], expected)
    again = made()
    again.load_state_dict(step.state_dict())
    assert same(again.carried[0], step.carried[0])
    assert again.carried[0].get_seq_length() == 6
    for each in (step, again):
        each.run(ids[:, 6:], begins[:, 6:])
    assert same(again.carried[0], step.carried[0])
    with torch.no_grad():
        assert close(step.carried[0], model(ids[:, 6:12], cache_params=expected).cache_params)
    step.forget(np.array([True, False]))
    assert same(step.carried[0].select([0]), step.carried[0].empty_like(1))
    assert same(step.carried[0].select([1]), again.carried[0].select([1]))


def test_parameters_are_drawn_anew(model):
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    for parameter in emptied.parameters():
        parameter.data.fill_(9)
    emptied.reset_parameters()
    assert all(block.mixer.bias.eq(0.5).all() for block in emptied.backbone.layers if isinstance(block.mixer, ToyMixer))
    assert not any(p.eq(9).any() for p in emptied.parameters())


def test_a_fingerprint_tells_what_the_mixers_compute(model, monkeypatch):
    before = fingerprint(model)
    monkeypatch.setattr(ToyMixer, "COMPUTATION_FIELDS", ("hidden_act_of_toys",))
    assert fingerprint(model) != before
