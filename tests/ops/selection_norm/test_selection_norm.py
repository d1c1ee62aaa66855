"""selection_norm: the contract, and every gradient against float64."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops import rms_norm, selection_norm
from mambakit.ops.selection_norm import reference
from tests.ops.closeness import relative_error

SHAPES = [((1,), 3, 5), ((2, 7), 1, 1), ((130,), 4, 16), ((3, 5), 33, 7), ((0, 4), 3, 2)]
"""Rows, r, n."""


def operands(shape, rank, n, weighted, dtype=torch.float64):
    selected = torch.randn(*shape, rank + 2 * n, dtype=torch.float64).to(dtype)
    return selected, [torch.randn(size) if weighted else None for size in (rank, n, n)]


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
@pytest.mark.parametrize(("shape", "rank", "n"), SHAPES)
def test_float64_equals_the_oracle(shape, rank, n, weighted):
    selected, weights = operands(shape, rank, n, weighted)
    leaves = [t.double().requires_grad_() for t in (selected, *weights) if t is not None]
    dy = torch.randn_like(selected)
    found = []
    for function in (selection_norm, reference.selection_norm):
        y = function(leaves[0], rank, 1e-5, *leaves[1:])
        found.append((y, *torch.autograd.grad(y, leaves, dy)))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) < 1e-12


def test_it_is_three_rms_norms():
    selected, weights = operands((2, 9), 6, 16, True, torch.bfloat16)
    y = selection_norm(selected, 6, 1e-6, *weights)
    for part, t, w in zip(y.split([6, 16, 16], -1), selected.split([6, 16, 16], -1), weights, strict=True):
        assert torch.equal(part, rms_norm(t, w, 1e-6)[0])


def test_strided_and_float16():
    selected = torch.randn(3, 2, 26).half()[..., ::2]
    y = selection_norm(selected, 5, 1e-5)
    assert y.dtype == torch.float16
    assert relative_error(y, reference.selection_norm(selected, 5, 1e-5)) < 1e-3


def test_gradcheck_and_opcheck():
    selected, weights = operands((2, 3), 3, 2, True)
    leaves = [t.double().requires_grad_() for t in (selected, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: selection_norm(x, 3, 1e-5, *w), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    torch.library.opcheck(torch.ops.mambakit.selection_norm, (*single, 3, 1e-5))
    torch.library.opcheck(torch.ops.mambakit.selection_norm, (single[0], None, None, None, 3, 1e-5))
    plain = [t.detach() for t in single]
    for given in (plain[1:], [None] * 3):
        arguments = (torch.randn_like(plain[0]), plain[0], *given, 3, 1e-5)
        torch.library.opcheck(torch.ops.mambakit.selection_norm_backward, arguments)


def test_arguments_are_checked():
    x = torch.randn(2, 9)
    with pytest.raises(ValueError, match="9 channels and rank 4; expected r"):
        selection_norm(x, 4, 1e-5)
    with pytest.raises(ValueError, match="9 channels and rank 0"):
        selection_norm(x, 0, 1e-5)
    with pytest.raises(ValueError, match="dt_weight, C_weight without the others"):
        selection_norm(x, 5, 1e-5, torch.ones(5), None, torch.ones(2))
    with pytest.raises(ValueError, match=r"B_weight has shape \(3,\), expected \(n,\) = \(2,\)"):
        selection_norm(x, 5, 1e-5, torch.ones(5), torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match=r"selected is torch.int64"):
        selection_norm(x.long(), 5, 1e-5)
