"""The norm kernels against the float64 chunked."""

from __future__ import annotations

import itertools

import pytest
import torch

from mambakit.ops.rms_norm import chunked
from mambakit.ops.rms_norm import cpu as norm
from tests.ops.closeness import relative_error
from tests.ops.selective_scan.test_cpu import TOLERANCE, exact, poison


@pytest.mark.parametrize("x_dtype,residual_dtype", list(itertools.product(TOLERANCE, TOLERANCE)))
def test_against_float64(isa, x_dtype, residual_dtype):
    for shape in ((1, 1, 3), (2, 3, 768), (5, 7, 33), (130, 20)):
        x = torch.randn(*shape[:-1], shape[-1] + 4).to(x_dtype)[..., 2:-2]
        weight = torch.randn(shape[-1])
        for residual in (None, torch.randn(shape).to(residual_dtype)):
            poison()
            y, kept = norm.forward(x, weight, residual, 1e-5, residual_dtype, x_dtype)
            want, want_kept = chunked.forward(x, weight, residual, 1e-5, residual_dtype, torch.float64)
            assert (y.dtype, kept.dtype) == (x_dtype, residual_dtype)
            assert torch.equal(kept, want_kept)
            assert relative_error(y, want) < TOLERANCE[x_dtype]
            gradients = torch.randn(shape).to(x_dtype), torch.randn(shape).to(residual_dtype)
            for dkept in (None, gradients[1]):
                got = norm.backward(gradients[0], dkept, kept, weight, 1e-5, x_dtype, residual is not None)
                expected = chunked.backward(
                    *exact([gradients[0], dkept, kept, weight]), 1e-5, torch.float64, residual is not None
                )
                bounds = (TOLERANCE[x_dtype], 1e-5, TOLERANCE[residual_dtype])
                for i, bound in enumerate(bounds):
                    assert relative_error(got[i], expected[i]) < bound, i


def test_without_weight_and_the_same_for_any_threads(isa):
    x, dy = torch.randn(100, 65), torch.randn(100, 65)
    y, kept = norm.forward(x, None, None, 1e-5, torch.float32, torch.float32)
    assert relative_error(y, chunked.forward(x.double(), None, None, 1e-5, torch.float64, torch.float64)[0]) < 1e-6
    threads = torch.get_num_threads()
    weight = torch.randn(65)
    try:
        results = []
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(norm.backward(dy, None, kept, weight, 1e-5, torch.float32, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty(isa):
    y, kept = norm.forward(torch.randn(0, 8), torch.randn(8), None, 1e-5, torch.float32, torch.float32)
    assert y.shape == kept.shape == (0, 8)
    dx, dweight, _ = norm.backward(y, None, kept, torch.randn(8), 1e-5, torch.float32, False)
    assert dx.shape == (0, 8)
    assert not dweight.any()
