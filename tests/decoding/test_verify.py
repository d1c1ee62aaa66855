"""Draft verification: the bits of decoding token by token, whatever the draft was and however much of it is kept."""

from __future__ import annotations

import random

import pytest
import torch

from mambakit import MambaConfig, MambaForCausalLM
from mambakit.decoding import verify_layers as module
from mambakit.decoding.registry import token_step, verifier
from mambakit.decoding.verify import ForwardVerifier, NativeVerifier, PersistentVerifier
from mambakit.decoding.verify_layers import CapturedVerifier, LayersVerifier
from mambakit.ops._backends import native
from tests.models.configurations import NAMES, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
# (tokens of a draft, how many of them are kept)
DRAFTS = ((5, 2), (7, 7), (1, 1), (6, 1), (3, 0), (4, 4), (7, 5))


def compare(model, make, ids, start=10):
    """Largest differences of logits and states between verified drafts and plain steps; whether all bits agree."""
    plain = model(ids[:, :start], use_cache=True).cache_params
    tried = plain.clone()
    step, verify = token_step(model, plain), make(model, tried, 7)
    at, exact, error = start, True, 0.0
    for count, kept in DRAFTS:
        wrong = torch.randint(0, 61, (count - kept,)).tolist()
        before = tried.clone()
        logits = verify(torch.tensor([ids[0, at : at + kept].tolist() + wrong], device=ids.device))[0]
        assert logits.shape == (count, model.config.vocab_size)
        assert torch.equal(before.ssm_states, tried.ssm_states), "a verification writes no state"
        assert torch.equal(before.conv_states, tried.conv_states)
        for j in range(kept):
            expected = step(ids[:, at + j])[0]
            exact &= torch.equal(logits[j], expected)
            error = max(error, worst(logits[j], expected))
        verify.commit([kept])
        if not kept:
            assert torch.equal(before.ssm_states, tried.ssm_states)
        at += kept
        exact &= torch.equal(plain.ssm_states, tried.ssm_states) and torch.equal(plain.conv_states, tried.conv_states)
        error = max(error, worst(tried.ssm_states, plain.ssm_states), worst(tried.conv_states, plain.conv_states))
        assert tried.get_seq_length() == at
    return exact, error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_bits_of_plain_decoding(name, dtype):
    model = pair(name)[0].eval().to(dtype)
    exact, error = compare(model, verifier, tokens(1, 40))
    if isinstance(verifier(model, model.backbone.new_cache(1), 7), NativeVerifier):
        assert exact
    else:  # products of several rows sum in another order
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def compare_rows(model, make, ids, start=10):
    """As `compare`, for several rows whose drafts are kept to different lengths."""
    rows = len(ids)
    tried = model(ids[:, :start], use_cache=True).cache_params
    plains = [tried.select([i]) for i in range(rows)]
    steps, verify, at = [token_step(model, plain) for plain in plains], make(model, tried, 7), [start] * rows
    chance, exact, error = random.Random(rows), True, 0.0
    for count in (5, 7, 1, 6, 4):
        kept = [chance.randrange(count + 1) for _ in range(rows)]
        draft = torch.randint(0, 61, (rows, count), device=ids.device)
        for i, m in enumerate(kept):
            draft[i, :m] = ids[i, at[i] : at[i] + m]
        before = tried.clone()
        logits = verify(draft)
        assert logits.shape == (rows, count, model.config.vocab_size)
        assert torch.equal(before.ssm_states, tried.ssm_states), "a verification writes no state"
        assert torch.equal(before.conv_states, tried.conv_states)
        for i, m in enumerate(kept):
            for j in range(m):
                expected = steps[i](ids[i : i + 1, at[i] + j])[0]
                exact &= torch.equal(logits[i, j], expected)
                error = max(error, worst(logits[i, j], expected))
        verify.commit(kept)
        at = [a + m for a, m in zip(at, kept, strict=True)]
        for i, plain in enumerate(plains):
            for mine, own in ((tried.ssm_states, plain.ssm_states), (tried.conv_states, plain.conv_states)):
                exact &= torch.equal(mine[:, i : i + 1], own)
                error = max(error, worst(mine[:, i : i + 1], own))
    return exact, error


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_several_rows(name, rows):
    """Drafts of several rows together, each kept to its own length: one by one they are the same."""
    model = pair(name)[0].eval()
    exact, error = compare_rows(model, verifier, tokens(rows, 50))
    if isinstance(verifier(model, model.backbone.new_cache(rows), 7), NativeVerifier):
        assert exact
    else:
        assert error < 1e-5
    assert compare_rows(model, ForwardVerifier, tokens(rows, 50))[1] < 1e-5
    if name != "custom_block":
        assert compare_rows(model, LayersVerifier, tokens(rows, 50))[1] < 1e-5


@pytest.mark.parametrize("name", ["plain", "odd_everything", "use_bias"])
@torch.no_grad()
def test_the_models_own_layers(name):
    model = pair(name)[0].eval()
    assert compare(model, LayersVerifier, tokens(1, 40))[1] < 1e-5
    model.double()
    assert compare(model, LayersVerifier, tokens(1, 40))[1] < 1e-12


@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.no_grad()
def test_quantised_weights(format):
    if native.describe()["isa"] is None:
        pytest.skip("needs the native library")
    model = pair("plain")[0].eval().quantize(format, 32)
    assert compare(model, verifier, tokens(1, 40))[0]


@pytest.mark.parametrize("name", ["plain", "odd_everything", "gelu", "falcon"])
@torch.no_grad()
def test_what_the_graphs_run(name, monkeypatch):
    """A fixed number of tokens, the rest not kept: on the CPU, with each graph's contents run again for each replay."""

    class Eager:
        def __init__(self, run, device, warm_ups):
            self.run, self.result = run, run()

        def replay(self):
            again = self.run()
            if again is not None:
                self.result.copy_(again)

    monkeypatch.setattr(module, "CapturedGraph", Eager)
    model = pair(name)[0].eval()
    assert compare(model, CapturedVerifier, tokens(1, 40))[1] < 1e-5
    assert compare_rows(model, CapturedVerifier, tokens(3, 50))[1] < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["plain", "odd_everything", "gelu", "falcon"])
@torch.no_grad()
def test_graphs(name):
    model = pair(name)[0].eval().cuda()
    error = compare(model, CapturedVerifier, tokens(1, 40).cuda())[1]
    error = max(error, compare_rows(model, CapturedVerifier, tokens(3, 50).cuda())[1])
    assert error < 1e-3  # float32 products on a GPU round to TF32 where the user allows it


@torch.no_grad()
def test_mistakes():
    model = pair("plain")[0].eval()
    cache = model.backbone.new_cache(1)
    for make in (verifier, LayersVerifier):
        verify = make(model, cache, 4)
        with pytest.raises(ValueError, match="commit of 1 tokens, but 0"):
            verify.commit([1])
        verify(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="commit of 3 tokens, but 2"):
            verify.commit([3])
        verify.commit([2])
        with pytest.raises(ValueError, match="commit of 1 tokens, but 0"):
            verify.commit([1])
    assert isinstance(verifier(model, cache, 17), ForwardVerifier), "what the others do not serve"
    with pytest.raises(ValueError, match="0 tokens of 1 rows"):
        verifier(model, cache, 0)


def served(dtype=torch.bfloat16, **changed):
    """A model of a shape that the persistent kernel serves, on the GPU."""
    torch.manual_seed(0)
    shape = {"vocab_size": 999, "hidden_size": 256, "num_hidden_layers": 3, "time_step_rank": 16} | changed
    return MambaForCausalLM(MambaConfig(**shape)).to("cuda", dtype).eval()


@pytest.mark.cuda
@pytest.mark.parametrize("tokens_at_most", [7, 8])
@torch.no_grad()
def test_the_persistent_kernel(tokens_at_most):
    """One launch a draft, and its bits are those of the graph of one token."""
    model = served()
    ids = torch.randint(0, 61, (1, 40), device="cuda")
    made = verifier(model, model.backbone.new_cache(1), tokens_at_most)
    assert isinstance(made, PersistentVerifier)
    exact, _ = compare(model, lambda m, cache, _: verifier(m, cache, tokens_at_most), ids)
    assert exact
    assert not isinstance(verifier(model, model.backbone.new_cache(1), 9), PersistentVerifier)


@pytest.mark.cuda
@torch.no_grad()
def test_two_texts_take_turns():
    model = served()
    ids = torch.randint(0, 999, (2, 30), device="cuda")
    alone, both = [], []
    for row in ids:
        verify = verifier(model, model.backbone.new_cache(1), 4)
        for at in range(0, 28, 4):
            alone.append(verify(row[None, at : at + 4])[0].clone())
            verify.commit([3])
    caches = [model.backbone.new_cache(1) for _ in ids]
    verifiers = [verifier(model, cache, 4) for cache in caches]
    for at in range(0, 28, 4):
        for row, verify in zip(ids, verifiers, strict=True):
            both.append(verify(row[None, at : at + 4])[0].clone())
            verify.commit([3])
    assert torch.equal(torch.stack(alone), torch.stack(both[::2] + both[1::2]))
    for verify in verifiers:
        verify(ids[:1, :2])
    with pytest.raises(RuntimeError, match="another text"):
        verifiers[0].commit([1])


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("most", [2, 5])
@torch.no_grad()
def test_many_rows_on_a_gpu(rows, most):
    """Triton's kernels verify the drafts of several rows as the forward does, within bfloat16's rounding."""
    from mambakit.decoding.verify_rows import ManyRowsVerifier
    from mambakit.ops.decode.triton_many_rows import most_rows

    for dtype, limit in ((torch.bfloat16, 3e-2), (torch.float32, 1e-3)):
        model = served(dtype)
        cache = model.backbone.new_cache(rows)
        served_by_them = rows * most <= most_rows(model.config.hidden_size, dtype)
        assert isinstance(verifier(model, cache, most), ManyRowsVerifier) == served_by_them
        ids = torch.randint(0, 999, (rows, 60), device="cuda")
        assert compare_rows(model, lambda m, c, n: ManyRowsVerifier(m, c, 7), ids)[1] < limit


@torch.no_grad()
def test_what_is_kept_with_a_model_does_not_refer_to_it():
    model = pair("plain")[0].eval()
    cache = model.backbone.new_cache(2)
    assert LayersVerifier(model, cache, 4).holds_model
    assert ForwardVerifier(model, cache, 4).holds_model
    assert not CapturedVerifier.holds_model
    assert not PersistentVerifier.holds_model
