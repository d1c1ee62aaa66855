"""State in, state out: any chunking, padding, packing, and what can be done with a cache."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import mambakit
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
TIGHT = 1e-5


@pytest.fixture(params=["plain", "use_bias", "odd_everything", "falcon", "gelu"])
def model(request):
    return pair(request.param)[0]


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grad", [False, True])
def test_any_chunking_equals_the_whole(model, seed, grad):
    ids = tokens(2, 40)
    whole = run(model, ids, use_cache=True)
    cuts = sorted(random.Random(seed).sample(range(1, 40), 6))
    cache, parts = None, []
    with torch.set_grad_enabled(grad):
        for start, end in zip([0, *cuts], [*cuts, 40], strict=True):
            out = model(ids[:, start:end], cache_params=cache, use_cache=True)
            cache = out.cache_params
            parts.append(out.logits)
    assert worst(torch.cat(parts, 1), whole.logits) < TIGHT
    assert worst(cache.ssm_states, whole.cache_params.ssm_states) < TIGHT
    assert worst(cache.conv_states, whole.cache_params.conv_states) < TIGHT
    assert cache.get_seq_length() == 40


def test_one_token_at_a_time_in_float64_is_the_oracle(model):
    model = model.double()
    ids = tokens(1, 25)
    whole = run(model, ids)
    cache = model.backbone.new_cache(1)
    parts = [run(model, ids[:, t : t + 1], cache_params=cache).logits for t in range(25)]
    assert whole.logits.dtype == torch.float64
    assert worst(torch.cat(parts, 1), whole.logits) < 1e-12


MASKS = {
    "left": [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 10],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 10],
    "ragged": [[0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "an empty row": [[0] * 10, [1] * 10],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_padding_changes_nothing_and_decode_continues(model, kind, grad):
    mask = torch.tensor(MASKS[kind])
    ids, more = tokens(2, 10), tokens(2, 3)
    with torch.set_grad_enabled(grad):
        padded = model(ids, attention_mask=mask, use_cache=True)
        stepped = [model(more[:, t : t + 1], cache_params=padded.cache_params).logits for t in range(3)]
    for row in range(2):
        kept = mask[row].bool()
        alone = ids[row, kept][None]
        cache = model.backbone.new_cache(1)
        if kept.any():
            expected = run(model, alone, cache_params=cache)
            assert worst(padded.logits[row, kept], expected.logits[0]) < TIGHT
        after = run(model, more[row : row + 1], cache_params=cache)
        assert worst(torch.cat(stepped, 1)[row], after.logits[0]) < TIGHT


def test_a_mask_in_the_middle_of_a_conversation(model):
    """A second padded batch continues from a state that is not zero."""
    first, second = tokens(2, 7), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = run(model, first, use_cache=True)
    full_mask = torch.cat([torch.ones(2, 7, dtype=torch.long), mask], 1)
    for given in (mask, full_mask):
        cache = out.cache_params.clone()
        got = run(model, second, cache_params=cache, attention_mask=given)
        for row in range(2):
            kept = mask[row].bool()
            whole = run(model, torch.cat([first[row], second[row, kept]])[None], use_cache=True)
            assert worst(got.logits[row, kept], whole.logits[0, 7:]) < TIGHT
            assert worst(cache.ssm_states[:, row], whole.cache_params.ssm_states[:, 0]) < TIGHT


def test_full_length_masks_on_one_token_steps(model):
    ids = tokens(2, 8)
    out = run(model, ids[:, :7], use_cache=True)
    cache = out.cache_params.clone()
    step = run(model, ids[:, 7:], cache_params=cache, attention_mask=torch.ones(2, 8, dtype=torch.long))
    assert worst(step.logits[:, 0], run(model, ids).logits[:, -1]) < TIGHT
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\), expected \(2, 1\), or \(2, 8\)"):
        run(model, ids[:, 7:], cache_params=out.cache_params, attention_mask=torch.ones(2, 5, dtype=torch.long))


def test_cu_seqlens_packed_equals_separate(model):
    lengths = [5, 1, 9, 3]
    docs = [tokens(1, n) for n in lengths]
    row = torch.cat(docs, 1)
    cu = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)
    packed = run(model, row, labels=row, cu_seqlens=cu, use_cache=True, output_hidden_states=True)
    separate = [run(model, doc, labels=doc, use_cache=True) for doc in docs]
    assert worst(packed.logits, torch.cat([s.logits for s in separate], 1)) < TIGHT
    states = torch.cat([s.cache_params.ssm_states for s in separate], 1)
    assert worst(packed.cache_params.ssm_states, states) < TIGHT
    scored = [n - 1 for n in lengths]
    total = sum(s.loss * n for s, n in zip(separate, scored, strict=True) if n)
    assert worst(packed.loss, total / sum(scored)) < TIGHT
    # and it continues: sequence i from row i
    one_each = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    more = run(model, row[:, :4], cu_seqlens=one_each, cache_params=packed.cache_params)
    for i, s in enumerate(separate):
        assert worst(more.logits[:, i], run(model, row[:, i : i + 1], cache_params=s.cache_params).logits[:, 0]) < TIGHT


def test_position_ids_that_restart_separate_documents(model):
    ids = tokens(2, 12)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6]])
    out = run(model, ids, labels=ids, position_ids=position_ids, use_cache=True)
    bounds = [[0, 5, 12], [0, 3, 5, 12]]
    losses, count = 0.0, 0
    for row, edges in enumerate(bounds):
        for start, end in pairwise(edges):
            alone = run(model, ids[row : row + 1, start:end], labels=ids[row : row + 1, start:end], use_cache=True)
            assert worst(out.logits[row, start:end], alone.logits[0]) < TIGHT
            losses, count = losses + alone.loss * (end - start - 1), count + end - start - 1
        assert worst(out.cache_params.ssm_states[:, row], alone.cache_params.ssm_states[:, 0]) < TIGHT
    assert worst(out.loss, losses / count) < TIGHT


def test_position_ids_with_a_cache(model):
    first, second = tokens(1, 6), tokens(1, 5)
    base = run(model, first, use_cache=True).cache_params
    continuing = run(model, second, cache_params=base.clone(), position_ids=torch.arange(6, 11)[None])
    assert worst(continuing.logits, run(model, torch.cat([first, second], 1)).logits[:, 6:]) < TIGHT
    restarting = run(model, second, cache_params=base.clone(), position_ids=torch.tensor([[6, 7, 0, 1, 2]]))
    assert worst(restarting.logits[:, 2:], run(model, second[:, 2:]).logits) < TIGHT
    fresh = run(model, second, cache_params=base.clone(), position_ids=torch.arange(5)[None])
    assert worst(fresh.logits, run(model, second).logits) < TIGHT


def test_padded_documents_have_the_loss_of_unpadded_ones(model):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    padded = run(model, ids, labels=ids, attention_mask=mask)
    a, b = run(model, ids[:1, :6], labels=ids[:1, :6]), run(model, ids[1:], labels=ids[1:])
    assert worst(padded.loss, (a.loss * 5 + b.loss * 8) / 13) < TIGHT


def test_a_cache_of_inference_mode_goes_on_under_autograd(model):
    before, after = tokens(2, 5), tokens(2, 4)
    with torch.inference_mode():
        inference = model(before, use_cache=True).cache_params
    with torch.no_grad():
        plain = model(before, use_cache=True).cache_params
    losses = [model(after, cache_params=cache, labels=after).loss for cache in (inference, plain)]
    assert torch.equal(*losses)
    torch.autograd.grad(losses[0], list(model.parameters()))


def test_gradients_flow_through_the_cache(model):
    """Backpropagation over two windows with a carried state equals backpropagation over the whole."""
    model.train()
    ids = tokens(2, 14)

    def loss_of(logits, at):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at].flatten())

    model.zero_grad()
    whole = model(ids).logits
    loss_of(whole[:, :13], slice(1, 14)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], cache_params=first.cache_params)
    loss_of(torch.cat([first.logits, second.logits], 1)[:, :13], slice(1, 14)).backward()
    for name, parameter in model.named_parameters():
        assert worst(parameter.grad, expected[name]) < 1e-4, name


# -- the cache itself --------------------------------------------------------------------------------------------------


def test_clone_select_reset_copy(model):
    ids = tokens(3, 8)
    cache = run(model, ids, use_cache=True).cache_params
    snapshot = cache.clone()
    run(model, tokens(3, 2), cache_params=cache)
    assert not torch.equal(cache.ssm_states, snapshot.ssm_states)
    assert snapshot.get_seq_length() == 8
    forked = snapshot.select([1, 1, 0])
    nxt = tokens(1, 1).expand(3, 1)
    logits = run(model, nxt, cache_params=forked).logits
    assert worst(logits[1], logits[0]) < TIGHT
    expected = run(model, torch.cat([ids[:1], nxt[:1]], 1)).logits[:, -1]
    assert worst(logits[2], expected) < TIGHT
    pool = mambakit.MambaCache(model.config, 5)
    pool.copy_(snapshot, [2, 0], [4, 1])
    assert torch.equal(pool.ssm_states[:, 4], snapshot.ssm_states[:, 2])
    assert torch.equal(pool.conv_states[:, 1], snapshot.conv_states[:, 0])
    assert not pool.ssm_states[:, [0, 2, 3]].any()
    pool.reset([4])
    assert not pool.ssm_states[:, 4].any()
    assert pool.ssm_states[:, 1].any()
    pool.reset()
    assert not pool.ssm_states.any()
    assert pool.nbytes == pool.ssm_states.nbytes + pool.conv_states.nbytes
    with pytest.raises(ValueError, match="outside the 3 rows"):
        snapshot.select([3])
    with pytest.raises(NotImplementedError, match="cannot be cut back"):
        snapshot.crop(4)


def test_saved_and_loaded_equals_never_saved(model, tmp_path):
    ids, more = tokens(2, 8), tokens(2, 5)
    cache = run(model, ids, use_cache=True).cache_params
    path = tmp_path / "state.safetensors"
    cache.save(path)
    loaded = mambakit.MambaCache.load(path, model.config)
    assert loaded.get_seq_length() == 8
    assert torch.equal(run(model, more, cache_params=loaded).logits, run(model, more, cache_params=cache).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_another_models_state_is_refused(tmp_path):
    model = pair("plain")[0]
    path = tmp_path / "state.safetensors"
    run(model, tokens(1, 3), use_cache=True).cache_params.save(path)
    other = mambakit.MambaConfig(vocab_size=62, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="vocab_size: file 61, model 62"):
        mambakit.MambaCache.load(path, other)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        mambakit.MambaCache.load(path, model.config)


def test_wrong_caches_are_refused(model):
    import transformers

    ids = tokens(2, 4)
    with pytest.raises(TypeError, match="DynamicCache"):
        model(ids, cache_params=transformers.DynamicCache())
    with pytest.raises(ValueError, match="the batch has 2 rows but the cache 3"):
        model(ids, cache_params=mambakit.MambaCache(model.config, 3))
    a, b = mambakit.MambaCache(model.config, 2), mambakit.MambaCache(model.config, 2)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache_params=a, past_key_values=b)
    assert model(ids, past_key_values=a).cache_params is a


def test_wrong_arguments_are_refused(model):
    ids = tokens(1, 4)
    with pytest.raises(TypeError, match="attention_maks"):
        model(ids, attention_maks=torch.ones(1, 4))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="no attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="rise from 0 to the packed length 4"):
        model(ids, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))


def test_a_cache_of_a_configuration_that_was_saved(tmp_path):
    """transformers writes the dtype into it as text."""
    model = pair("plain")[0].bfloat16()
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    cache = mambakit.MambaCache(model.config, 2)
    assert (cache.dtype, cache.ssm_states.dtype) == (torch.bfloat16, torch.float32)
    model(tokens(2, 5), cache_params=cache)
    assert mambakit.MambaCache(model.config, 1, dtype="float16").dtype == torch.float16
