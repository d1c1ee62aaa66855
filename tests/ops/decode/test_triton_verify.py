"""Drafts of several slots in Triton, against the model's forward: on a GPU, interpreted, and compiled."""

import pytest
import torch

pytest.importorskip("triton")

from mambakit.decoding.graph_step import gpu_weights
from mambakit.ops.decode.triton_many_rows import MOST_ROWS, ManyRowsStep
from mambakit.ops.decode.triton_verify import ManyRowsVerification
from tests.ops.decode.test_triton import SHAPES, SMALL, made
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("slots", "draft"), [(1, 1), (1, 5), (3, 4), (8, 16)])
@pytest.mark.parametrize("small", [True, False], ids=["small tiles", "own tiles"])
@torch.no_grad()
def test_drafts_and_what_is_kept_of_them(device, shape, slots, draft, small):
    if INTERPRETED and ((slots, draft) not in ((3, 4), (1, 5)) or small != (slots == 3) or (slots == 1 and shape)):
        pytest.skip("too slow in the interpreter")
    model = made(shape, torch.float32, device)
    ids = torch.randint(0, 97, (slots, 3 + 4 * draft + 40), device=device)
    cache = model(ids[:, :3], use_cache=True).cache_params
    weights = gpu_weights(model)
    chosen = SMALL[ManyRowsStep] if small else None
    verify = ManyRowsVerification(weights, cache.conv_states, cache.ssm_states, draft, chosen=chosen)
    whole = model(ids).logits
    read = [3] * slots
    for turn in range(2 if INTERPRETED else 4):
        tokens = torch.stack([ids[i, r : r + draft] for i, r in enumerate(read)])
        before = cache.clone()
        verify.tokens.copy_(tokens.flatten())
        logits = verify().view(slots, draft, -1)
        assert torch.equal(cache.ssm_states, before.ssm_states)
        assert torch.equal(cache.conv_states, before.conv_states)
        for i, r in enumerate(read):
            assert (logits[i] - whole[i, r : r + draft]).abs().max() < 3e-5
        kept = [(turn + 2 * i) % (draft + 1) for i in range(slots)]
        verify.kept.copy_(torch.tensor(kept))
        verify.commit()
        read = [r + m for r, m in zip(read, kept, strict=True)]
        for i, r in enumerate(read):
            own = model(ids[i : i + 1, :r], use_cache=True).cache_params
            assert (cache.ssm_states[:, i] - own.ssm_states[:, 0]).abs().max() < 1e-5
            assert (cache.conv_states[:, i] - own.conv_states[:, 0]).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_a_slot_does_not_depend_on_the_others():
    model = made({"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 1000}, torch.bfloat16, "cuda")
    cache = model(torch.randint(0, 1000, (8, 39), device="cuda"), use_cache=True).cache_params
    verify = ManyRowsVerification(gpu_weights(model), cache.conv_states, cache.ssm_states, 4)
    verify.tokens.random_(0, 1000)
    first = verify()[:4].clone()
    verify.tokens[4:] = 7
    cache.ssm_states[:, 1:] = 0
    assert torch.equal(verify()[:4], first)


def test_what_it_cannot_serve():
    model = made({}, torch.float32, "cpu")
    cache = model.backbone.new_cache(16)
    with pytest.raises(ValueError, match=f"{16 * 60} rows; it serves 1 to {MOST_ROWS}"):
        ManyRowsVerification(gpu_weights(model), cache.conv_states, cache.ssm_states, 60)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there is a GPU, or it is interpreted")
def test_interpreter():
    run_interpreted(__file__)
