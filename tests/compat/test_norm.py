"""mamba_ssm's norms against float64: residual streams, biases, parallel branches, dropout, the older argument order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from mambakit.compat import norm, norm_references
from tests.compat.oracles import error, gradients, leaves, wide

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def exact_norm(total, weight, bias, eps, is_rms_norm):
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("is_rms_norm", "has_bias", "has_residual"), list(itertools.product([True, False], repeat=3)))
def test_values_and_gradients(is_rms_norm, has_bias, has_residual, dtype):
    x, residual = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24) if has_residual else None
    if dtype == torch.float64 and has_residual:
        residual = residual.double()
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype) if has_bias else None
    mine, exact = leaves(x, weight, bias, residual), leaves(*map(wide, (x, weight, bias, residual)))
    y, total = norm.layer_norm_fn(
        *mine[:3], residual=mine[3], eps=1e-5, prenorm=True, residual_in_fp32=True, is_rms_norm=is_rms_norm
    )
    right = exact[0] if residual is None else exact[0] + exact[3]
    expected = exact_norm(right, exact[1], exact[2], 1e-5, is_rms_norm)
    assert y.dtype == dtype
    assert total.dtype == torch.float32 or (dtype == torch.float64 and has_residual)
    assert error(y, expected) < TOLERANCE[dtype]
    assert error(total, right) < 1e-6
    dy, dtotal = torch.randn(y.shape).to(dtype), torch.randn(total.shape).to(total.dtype)
    found = torch.autograd.grad((y, total), [t for t in mine if t is not None], (dy, dtotal))
    wanted = torch.autograd.grad((expected, right), [t for t in exact if t is not None], (dy.double(), dtotal.double()))
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 4 * max(TOLERANCE[dtype], 1e-6 if not has_residual else 0)


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_parallel_branches_row_scales_and_a_second_weight(is_rms_norm):
    x, x1, residual = (torch.randn(3, 7, 16) for _ in range(3))
    weight, bias, weight1, bias1 = (torch.randn(16) for _ in range(4))
    fn = norm.rms_norm_fn if is_rms_norm else norm.layer_norm_fn
    y, y1, total = fn(x, weight, bias, residual, x1, weight1, bias1, prenorm=True)
    right = x.double() + x1.double() + residual.double()
    assert error(total, right) < 1e-6
    assert error(y, exact_norm(right, weight.double(), bias, 1e-6, is_rms_norm)) < 1e-6
    assert error(y1, exact_norm(right, weight1.double(), bias1, 1e-6, is_rms_norm)) < 1e-6
    scale = torch.rand(3, 7)
    y = fn(x, weight, None, rowscale=scale)
    assert error(y, exact_norm(x.double() * scale[..., None], weight.double(), None, 1e-6, is_rms_norm)) < 1e-6
    with pytest.raises(ValueError, match="rowscale does not go with x1"):
        fn(x, weight, None, x1=x1, rowscale=scale)


def test_dropout_keeps_a_share_and_says_which():
    x, x1, weight = torch.ones(50, 100), torch.ones(50, 100), torch.ones(100)
    y, total, kept, kept1 = norm.rms_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert error(total, (kept.double() + kept1.double()) / 0.75) < 1e-6
    assert error(y, exact_norm((kept.double() + kept1.double()) / 0.75, weight.double(), None, 1e-6, True)) < 1e-6
    assert 0.7 < kept.float().mean() < 0.8  # 5,000 draws: six deviations are 0.037
    assert not torch.equal(kept, kept1)


def test_the_module():
    module = norm.RMSNorm(24, eps=1e-3, dropout_p=0.5)
    assert module.bias is None
    assert list(module.state_dict()) == ["weight"]
    x, residual = torch.randn(4, 24), torch.randn(4, 24)
    y, total = module.eval()(x, residual, prenorm=True)
    assert torch.equal(total, x + residual)
    assert error(y, exact_norm(total.double(), module.weight.double(), None, 1e-3, True)) < 1e-6
    assert not torch.equal(module.train()(x), module.eval()(x))


def test_the_older_order_of_arguments():
    x, weight, bias, residual = torch.randn(3, 16), torch.randn(16), torch.randn(16), torch.randn(3, 16)
    y, total = norm.old_layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, False)
    assert error(y, exact_norm((x + residual).double(), weight.double(), bias, 1e-3, False)) < 1e-6
    y, total = norm.old_rms_norm_fn(x, weight, None, residual, True, False, 1e-3)
    assert error(y, exact_norm(total.double(), weight.double(), None, 1e-3, True)) < 1e-6


def test_norm_and_linear():
    x, weight, residual, matrix, offset = (torch.randn(s) for s in ((3, 16), (16,), (3, 16), (8, 16), (8,)))
    y, total = norm.layer_norm_linear_fn(x, weight, None, matrix, offset, residual, prenorm=True, is_rms_norm=True)
    expected = F.linear(exact_norm(total.double(), weight.double(), None, 1e-6, True), matrix.double(), offset.double())
    assert error(y, expected) < 1e-6


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_the_private_forward(is_rms_norm):
    x, weight, bias = torch.randn(6, 16).bfloat16(), torch.randn(16), torch.randn(16)
    y, y1, mean, deviation, total, *_ = norm.normalized_rows(
        x, weight, bias, 1e-5, out_dtype=torch.float32, residual_dtype=torch.float32, is_rms_norm=is_rms_norm
    )
    assert (y.dtype, total.dtype, y1) == (torch.float32, torch.float32, None)
    assert error(y, exact_norm(x.double(), weight.double(), bias, 1e-5, is_rms_norm)) < 1e-6
    assert (mean is None) == is_rms_norm
    centred = x.double() if is_rms_norm else x.double() - x.double().mean(-1, keepdim=True)
    assert error(deviation, 1 / torch.sqrt(centred.square().mean(-1) + 1e-5)) < 1e-6


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_references_agree(name):
    x, residual, x1 = (torch.randn(4, 16).bfloat16() for _ in range(3))
    weight, bias = torch.randn(16), torch.randn(16)
    reference, fn = getattr(norm_references, f"{name}_ref"), getattr(norm, f"{name}_fn")
    found, total = reference(x, weight, bias, residual, x1, prenorm=True, upcast=True)
    expected, right = fn(x, weight, bias, residual, x1, prenorm=True)
    assert error(found, expected) < 8e-3
    assert error(total, right) < 8e-3
    kept = torch.rand(4, 16) > 0.5
    assert error(reference(x, weight, bias, dropout_p=0.5, dropout_mask=kept, upcast=True),
                 reference(x.float() * kept * 2, weight, bias, upcast=True)) < 8e-3  # fmt: skip


def test_a_leaf_without_gradient_is_left_alone():
    x, weight, bias = leaves(torch.randn(2, 8), torch.randn(8), torch.randn(8))
    (gradient,) = gradients(norm.layer_norm_fn(x, weight.detach(), bias.detach()), [x], torch.ones(2, 8))
    assert gradient.shape == x.shape


def test_pickled_by_an_early_release():
    """Up to 1.2 it had no dropout, and no attribute for it."""
    for made, inside in ((norm.RMSNorm(8), []), (norm.RMSNorm(8, dropout_p=0.5), ["drop"])):
        state = {name: value for name, value in made.__dict__.items() if name != "drop"}
        again = norm.RMSNorm.__new__(norm.RMSNorm)
        again.__setstate__(state)
        assert list(again._modules) == inside
        x = torch.randn(3, 8)
        assert torch.equal(again.eval()(x), made.eval()(x))
