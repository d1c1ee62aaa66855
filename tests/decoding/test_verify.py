"""Draft verification: the bits of decoding token by token, whatever the draft was and however much of it is kept."""

from __future__ import annotations

import pytest
import torch

from mambakit import MambaConfig, MambaForCausalLM
from mambakit.decoding import verify as module
from mambakit.decoding.registry import token_step, verifier
from mambakit.decoding.verify import CapturedVerifier, LayersVerifier, NativeVerifier, PersistentVerifier
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
        logits = verify(ids[0, at : at + kept].tolist() + wrong)
        assert logits.shape == (count, model.config.vocab_size)
        assert torch.equal(before.ssm_states, tried.ssm_states), "a verification writes no state"
        assert torch.equal(before.conv_states, tried.conv_states)
        for j in range(kept):
            expected = step(ids[:, at + j])[0]
            exact &= torch.equal(logits[j], expected)
            error = max(error, worst(logits[j], expected))
        verify.commit(kept)
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
    error = compare(pair(name)[0].eval(), CapturedVerifier, tokens(1, 40))[1]
    assert error < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["plain", "odd_everything", "gelu", "falcon"])
@torch.no_grad()
def test_graphs(name):
    model = pair(name)[0].eval().cuda()
    error = compare(model, CapturedVerifier, tokens(1, 40).cuda())[1]
    assert error < 1e-3  # float32 products on a GPU round to TF32 where the user allows it


@torch.no_grad()
def test_mistakes():
    model = pair("plain")[0].eval()
    cache = model.backbone.new_cache(1)
    for make in (verifier, LayersVerifier):
        verify = make(model, cache, 4)
        with pytest.raises(ValueError, match="commit of 1 tokens, but 0"):
            verify.commit(1)
        verify([1, 2])
        with pytest.raises(ValueError, match="commit of 3 tokens, but 2"):
            verify.commit(3)
        verify.commit(2)
        with pytest.raises(ValueError, match="commit of 1 tokens, but 0"):
            verify.commit(1)
    with pytest.raises(ValueError, match="1 to 16"):
        verifier(model, cache, 17)
    with pytest.raises(ValueError, match="2 rows"):
        verifier(model, model.backbone.new_cache(2), 4)


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
    assert isinstance(verifier(model, model.backbone.new_cache(1), 9), CapturedVerifier)


@pytest.mark.cuda
@torch.no_grad()
def test_two_texts_take_turns():
    model = served()
    ids = torch.randint(0, 999, (2, 30), device="cuda")
    alone, both = [], []
    for row in ids:
        verify = verifier(model, model.backbone.new_cache(1), 4)
        for at in range(0, 28, 4):
            alone.append(verify(row[at : at + 4].tolist()))
            verify.commit(3)
    caches = [model.backbone.new_cache(1) for _ in ids]
    verifiers = [verifier(model, cache, 4) for cache in caches]
    for at in range(0, 28, 4):
        for row, verify in zip(ids, verifiers, strict=True):
            both.append(verify(row[at : at + 4].tolist()))
            verify.commit(3)
    assert torch.equal(torch.stack(alone), torch.stack(both[::2] + both[1::2]))
    verifiers[0]([1, 2])
    verifiers[1]([1, 2])
    with pytest.raises(RuntimeError, match="another text"):
        verifiers[0].commit(1)
