"""Prompts by the native library: float64's numbers, and a row's own bits in any batch."""

from __future__ import annotations

import copy

import pytest
import torch

from mambakit import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from mambakit.decoding import native_prompts
from mambakit.decoding.prefill import prefill, prefill_parts
from mambakit.decoding.slots import SlotPool
from mambakit.generation.engine import Engine, Request
from mambakit.ops._backends import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no native library")
LENGTHS = [1, 2, 4, 5, 16, 17, 33, 100]


def quantised(format: str, falcon: bool = False, dtype: torch.dtype = torch.float32, kernel: int = 4):
    torch.manual_seed(0)
    kinds = (FalconMambaConfig, FalconMambaForCausalLM) if falcon else (MambaConfig, MambaForCausalLM)
    config = kinds[0](
        vocab_size=61, hidden_size=40, num_hidden_layers=3, state_size=5, time_step_rank=7, conv_kernel=kernel,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = kinds[1](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).quantize(format)


def of_numbers(model):
    """The model in float64, of the numbers that the packed weights stand for."""
    wide = copy.deepcopy(model)
    wide.dequantize()
    return wide.double()


def read(model, ids, **options):
    cache = model.backbone.new_cache(len(ids))
    return prefill(model, ids, cache, **options), cache


@pytest.mark.parametrize("falcon", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("kernel", [2, 4])
@torch.no_grad()
def test_against_float64(format, falcon, kernel):
    """Also from a state, and cut into chunks."""
    model = quantised(format, falcon, kernel=kernel)
    oracle = of_numbers(model)
    assert native_prompts.why_not(model, model.backbone.new_cache(1)) is None
    for length in LENGTHS:
        ids = torch.randint(1, 61, (2, 2 * length))
        expected, expected_cache = read(oracle, ids)
        for chunk_size in (None, 1, 3, length):
            logits, cache = read(model, ids, chunk_size=chunk_size)
            # Activations of products are rounded to 16 bits a group: 2e-5 of a product, over three layers.
            torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)
            for name, tensor in cache.tensors().items():
                torch.testing.assert_close(tensor.double(), expected_cache.tensors()[name], rtol=1e-3, atol=1e-3)
            assert cache.get_seq_length() == 2 * length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_has_its_bits_in_any_batch(dtype):
    """Also where a batch is more tokens than a call takes."""
    model = quantised("int8", dtype=dtype)
    for rows, length in ((1, 1), (3, 4), (5, 17), (17, 33), (2, 200)):
        ids = torch.randint(1, 61, (rows, length))
        logits, cache = read(model, ids)
        for i in range(rows):
            alone, own = read(model, ids[i : i + 1])
            assert torch.equal(alone[0], logits[i])
            for name, tensor in own.tensors().items():
                assert torch.equal(tensor[:, 0], cache.tensors()[name][:, i])


@torch.no_grad()
def test_one_token_has_the_bits_of_a_step():
    model = quantised("int8")
    ids = torch.randint(1, 61, (1, 40))
    _, cache = read(model, ids)
    pool = SlotPool(model, 1, cache.clone())
    stepped = pool.step(torch.tensor([7])).clone()
    assert torch.equal(prefill(model, torch.tensor([[7]]), cache), stepped)
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, pool.states.tensors()[name])


@torch.no_grad()
def test_prompts_read_in_turn_do_not_meet():
    """Of two prompts, a layer each in turn."""
    model = quantised("int8")
    prompts = torch.randint(1, 61, (2, 1, 50))
    expected = [read(model, ids) for ids in prompts]
    caches = [model.backbone.new_cache(1) for _ in prompts]
    unread = [prefill_parts(model, ids, cache) for ids, cache in zip(prompts, caches, strict=True)]
    found = [None, None]
    parts = 0
    while None in found:
        for i, generator in enumerate(unread):
            try:
                next(generator)
                parts += 1
            except StopIteration as end:
                found[i] = end.value
    assert parts == 6, "one for each layer"
    for logits, cache, (whole, own) in zip(found, caches, expected, strict=True):
        assert torch.equal(logits, whole)
        assert torch.equal(cache.ssm_states, own.ssm_states)


@torch.no_grad()
def test_weights_that_change_are_seen():
    model = quantised("int8")
    ids = torch.randint(1, 61, (1, 9))
    before, _ = read(model, ids)
    model.backbone.layers[1].mixer.A_log.add_(0.5)
    after, _ = read(model, ids)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), read(of_numbers(model), ids)[0], rtol=1e-3, atol=1e-3)
    model.backbone.norm_f.weight = torch.nn.Parameter(model.backbone.norm_f.weight * 2)
    torch.testing.assert_close(read(model, ids)[0], 2 * after, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_hooks_are_called():
    model = quantised("int8")
    ids = torch.randint(1, 61, (1, 9))
    read(model, ids)
    seen = []
    hook = model.backbone.layers[0].mixer.register_forward_hook(lambda *_: seen.append(1))
    read(model, ids)
    assert seen
    hook.remove()
    seen.clear()
    read(model, ids)
    assert not seen


def test_where_it_does_not_serve():
    model = quantised("int8")
    cache = model.backbone.new_cache(1)
    assert native_prompts.why_not(model, cache) == "gradients are on"
    with torch.no_grad():
        assert native_prompts.native_prompts(model, cache) is not None
        plain = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=40, num_hidden_layers=1)).eval()
        assert native_prompts.native_prompts(plain, plain.backbone.new_cache(1)) is None
        assert "int8 and int4" in native_prompts.why_not(plain, plain.backbone.new_cache(1))


@torch.no_grad()
def test_an_engine_writes_what_generate_does():
    """`generate` reads the prompts as one batch, the engine one by one, between its steps."""
    model = quantised("int8")
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 61, (5, 21))
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, 21:].tolist()
    engine = Engine(model, 3)
    requests = [engine.submit(Request(row, max_new_tokens=9)) for row in ids]
    for _ in engine.run():
        pass
    assert [request.tokens for request in requests] == expected
