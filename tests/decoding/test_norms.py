"""Every decoder and verifier takes norms of dt, B and C: FalconMamba's without weights, Jamba's with."""

from __future__ import annotations

import copy

import pytest
import torch

from mambakit.decoding import registry
from mambakit.decoding.eligibility import why_not_by_weights
from mambakit.decoding.graph_step import _why_not_kernels, gpu_weights
from mambakit.modules.norm import MixerNorm
from mambakit.ops._backends import native
from tests.models.configurations import FALCON, pair
from tests.ops.decode.test_cuda_persistent import distance, exact
from tests.ops.decode.with_norms import with_norms

NORMS = {
    "falcon": {"mixer_rms_eps": 1e-3},
    "jamba": {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True},
}
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


def made(norms: str, **fields):
    torch.manual_seed(0)
    return with_norms(SMALL | NORMS[norms] | fields).eval()


@pytest.mark.parametrize("name", FALCON)
def test_no_reason_names_falcon_mamba_or_norms(name):
    model = pair(name)[0]
    kinds = (*registry.DECODERS, *registry.VERIFIERS)
    reasons = [kind.why_not(model, 1, 4) for kind in registry.VERIFIERS]
    reasons += [kind.why_not(model, 3) for kind in registry.DECODERS]
    assert len(reasons) == len(kinds)
    for reason in filter(None, reasons):
        assert "norm" not in reason
        assert "Falcon" not in reason
    assert why_not_by_weights(model) is None
    assert _why_not_kernels(model) is None, "the kernels of a GPU read it, too"


@pytest.mark.parametrize("norms", NORMS)
@torch.no_grad()
def test_a_native_step_has_the_models_numbers(norms):
    if native.describe()["isa"] is None:
        pytest.skip("needs the native library")
    model = made(norms)
    assert registry.choose(model, 2).name == "native library (CPU)"
    ids = torch.randint(0, 61, (2, 9))
    whole = model.double()(ids, use_cache=True)
    model.float()
    cache = model.backbone.new_cache(2)
    step = registry.token_step(model, cache)
    for t in range(9):
        assert distance(step(ids[:, t]), whole.logits[:, t]) < 1e-5
    assert distance(cache.ssm_states, whole.cache_params.ssm_states) < 1e-5


def test_norms_that_are_not_the_mixers_are_called():
    model = made("jamba")
    mixer = model.backbone.layers[1].mixer
    mixer.b_layernorm.eps = 1e-2
    assert why_not_by_weights(model) == (
        "layer 1: its norms of dt, B and C are of other classes, or have another epsilon"
    )
    mixer.b_layernorm.eps = 1e-3

    class Doubled(MixerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    mixer.c_layernorm = Doubled(16, 1e-3)
    assert "of other classes" in why_not_by_weights(model)
    x = torch.randn(1, 5, 32)
    y = mixer(x)
    mixer.c_layernorm = MixerNorm(16, 1e-3)
    mixer.c_layernorm.weight.data.fill_(2)
    assert torch.allclose(mixer(x), y, atol=1e-6)
    handle = mixer.dt_layernorm.register_forward_hook(lambda *_: None)
    assert why_not_by_weights(model) == "a module has a hook or another forward"
    handle.remove()


def test_layers_with_other_norms():
    model = made("jamba")
    model.backbone.layers[1].mixer.mixer_rms_eps = None
    assert why_not_by_weights(model) == "layer 1 normalises dt, B and C otherwise than layer 0"
    model = made("jamba")
    mixer = model.backbone.layers[1].mixer
    mixer.dt_layernorm = mixer.b_layernorm = mixer.c_layernorm = None
    assert why_not_by_weights(model) is None, "the native library reads each layer's own"
    assert _why_not_kernels(model) == "the norms of dt, B and C have weights in some layers only"
    with pytest.raises(ValueError, match="have weights in some layers only; give them to all or none"):
        _ = gpu_weights(model).norms


CARD = {"vocab_size": 999, "hidden_size": 256, "num_hidden_layers": 3, "time_step_rank": 16}
"""A shape that the persistent kernel serves."""
SERVED = [
    (1, torch.bfloat16, None, "persistent kernel (CUDA)"),
    (8, torch.bfloat16, None, "persistent kernel (CUDA)"),
    (1, torch.bfloat16, "int8", "persistent kernel (CUDA)"),
    (3, torch.bfloat16, "int4", "persistent kernel (CUDA)"),
    (1, torch.bfloat16, "fp8", "persistent kernel (CUDA)"),
    (16, torch.bfloat16, "int4", "kernels for many rows (Triton)"),
    (2, torch.float32, None, "kernels for few rows (Triton)"),
    (48, torch.bfloat16, None, "kernels for many rows (Triton)"),
]


@pytest.mark.cuda
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(("rows", "dtype", "packing", "decoder"), SERVED)
@torch.no_grad()
def test_decoders_on_a_gpu(norms, rows, dtype, packing, decoder):
    model = with_norms(CARD | NORMS[norms]).to("cuda", dtype).eval()
    if packing:
        model.quantize(packing)
    assert registry.choose(model, rows).name == decoder
    wide, ids = exact(model), torch.randint(0, 999, (rows, 9))
    whole = wide(ids, use_cache=True)
    cache = model.backbone.new_cache(rows)
    step = registry.token_step(model, cache)
    bound = 1e-4 if dtype == torch.float32 else 1.5e-2
    for t in range(9):
        assert distance(step(ids[:, t].cuda()), whole.logits[:, t]) < bound
    assert distance(cache.ssm_states, whole.cache_params.ssm_states) < bound


@pytest.mark.cuda
@pytest.mark.parametrize("norms", NORMS)
@torch.no_grad()
def test_texts_on_a_gpu(norms):
    """Prompts by captured graphs, steps by the decoder, drafts by the verifier: the forward's tokens."""
    model = with_norms(CARD | NORMS[norms]).to("cuda").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(0, 999, (1, 37), device="cuda")
    for _ in range(3):  # a graph is captured at a bucket's second use
        found = model.generate(ids, max_new_tokens=24, do_sample=False)
    wide = copy.deepcopy(model).cpu().double()
    logits = wide(found[:, :-1].cpu()).logits[:, 36:]
    gap = logits.max(-1).values - logits.gather(-1, found[:, 37:, None].cpu())[..., 0]
    assert gap.max() < 1e-3
    reasons = [kind.why_not(model, 1, 4) for kind in registry.VERIFIERS]
    assert any(reason is None for reason in reasons[1:3]), reasons
