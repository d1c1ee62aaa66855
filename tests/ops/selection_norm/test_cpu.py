"""The native kernels of selection_norm against float64."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.selection_norm import chunked, cpu
from tests.ops.closeness import relative_error
from tests.ops.selection_norm.test_selection_norm import SHAPES, operands
from tests.ops.selective_scan.test_cpu import TOLERANCE, poison


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
def test_the_native_kernels(isa, dtype, weighted):
    for shape, rank, n in SHAPES:
        selected, weights = operands(shape, rank, n, weighted, dtype)
        dy = torch.randn(selected.shape).to(dtype)
        poison()
        y = cpu.forward(selected, *weights, rank, 1e-5)
        assert y.dtype == dtype
        wide = [None if w is None else w.double() for w in weights]
        assert relative_error(y, chunked.forward(selected.double(), *wide, rank, 1e-5)) < TOLERANCE[dtype]
        found = cpu.backward(dy, selected, *weights, rank, 1e-5)
        expected = chunked.backward(dy.double(), selected.double(), *wide, rank, 1e-5)
        assert found[0].dtype == dtype
        # The gradient over a single channel is a difference of equal numbers: it is compared with what came in.
        error = (found[0].double() - expected[0]).norm() / torch.maximum(expected[0].norm(), dy.double().norm())
        assert not dy.numel() or error < TOLERANCE[dtype]
        for actual, want in zip(found[1:], expected[1:], strict=True):
            assert relative_error(actual, want) < 1e-5


def test_the_same_for_any_threads(isa):
    selected, weights = operands((100,), 65, 16, True, torch.float32)
    dy, threads = torch.randn(100, 97), torch.get_num_threads()
    found = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            found.append((cpu.forward(selected, *weights, 65, 1e-5), *cpu.backward(dy, selected, *weights, 65, 1e-5)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
def test_in_place_on_rows_of_a_wider_buffer(isa, weighted):
    """As a decode step calls it: rows apart, and what lies between them stays."""
    wide = torch.randn(5, 64)
    before, x = wide.clone(), wide[:, 3:45]
    weights = tuple(torch.randn(size) if weighted else None for size in (10, 16, 16))
    expected = chunked.forward(x.double(), *(None if w is None else w.double() for w in weights), 10, 1e-5)
    arguments = cpu.in_place(x, 10, 1e-5, weights)
    cpu.check(cpu.native.kernel("selection_norm")(cpu.ctypes.byref(arguments), cpu.ctypes.c_int64(0)))
    assert relative_error(x, expected) < 1e-6
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 45:], before[:, 45:])
