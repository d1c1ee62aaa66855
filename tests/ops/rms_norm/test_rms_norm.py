"""rms_norm: the norm, the residual stream and every gradient against float64."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops import rms_norm
from mambakit.ops.rms_norm import reference
from tests.ops.closeness import relative_error


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33)])
def test_float64_equals_the_oracle(shape, with_residual, weighted):
    leaves = {"x": torch.randn(shape, dtype=torch.float64)}
    if with_residual:
        leaves["residual"] = torch.randn(shape, dtype=torch.float64)
    if weighted:
        leaves["weight"] = torch.randn(shape[-1], dtype=torch.float64)
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    wy, wr = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    results = []
    for function in (rms_norm, reference.rms_norm):
        y, total = function(**leaves)
        grads = torch.autograd.grad((y * wy).sum() + (total * wr).sum(), list(leaves.values()))
        results.append((y, total, *grads))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12


def test_a_bfloat16_block_output_on_a_float32_stream():
    x, residual = torch.randn(4, 64).bfloat16(), torch.randn(4, 64)
    weight = torch.rand(64).bfloat16()
    y, total = rms_norm(x, weight, residual=residual)
    y0, total0 = reference.rms_norm(x, weight, residual=residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y, y0) < 3e-3
    assert relative_error(total, total0) < 1e-7


def test_dtypes_are_chosen():
    x = torch.randn(2, 8).bfloat16()
    y, total = rms_norm(x, torch.ones(8), residual_dtype=torch.float32, out_dtype=torch.float16)
    assert (y.dtype, total.dtype) == (torch.float16, torch.float32)
    y, total = rms_norm(x)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16)
    assert total.data_ptr() != x.data_ptr()


def test_only_one_output_used():
    x = torch.randn(3, 8, requires_grad=True)
    y, total = rms_norm(x, torch.ones(8))
    (only_total,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    torch.testing.assert_close(only_total, torch.ones(3, 8))
    (only_y,) = torch.autograd.grad(y.square().sum(), x)
    assert only_y.abs().max() < 1e-3  # the norm fixes the length of y: only eps lets it move


def test_gradcheck_and_opcheck():
    x, residual = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, c: rms_norm(a, b, residual=c), (x, weight, residual))
    f = torch.float32
    leaves = [t.detach().float().requires_grad_() for t in (x, weight, residual)]
    torch.library.opcheck(torch.ops.mambakit.rms_norm, (*leaves, 1e-5, f, torch.bfloat16))
    torch.library.opcheck(torch.ops.mambakit.rms_norm, (leaves[0], None, None, 1e-5, f, f))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.mambakit.rms_norm_backward, (plain[0], None, plain[2], plain[1], 1e-5, f, True))


def test_arguments_are_checked():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(x, residual=torch.zeros(2, 7))
    with pytest.raises(TypeError, match="x is torch.int64"):
        rms_norm(torch.zeros(2, 8, dtype=torch.int64))
