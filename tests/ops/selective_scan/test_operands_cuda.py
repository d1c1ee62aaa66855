"""The CUDA C++ scan on groups, constants, (b, d, l) memory and mixed dtypes, against the float64 reference.

On a GPU, and the kernels' logic without one: compiled for the CPU (`cuda_on_cpu.py`), a few cases as each compiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from mambakit.ops._layout import is_transposed
from mambakit.ops.selective_scan import cuda, cuda_backward, cuda_launch
from mambakit.ops.selective_scan.plan import EVEN_ROWS
from tests.ops.closeness import relative_error
from tests.ops.selective_scan import cuda_on_cpu, test_cuda
from tests.ops.selective_scan.operands import (
    BF16,
    F16,
    F32,
    Case,
    differentiate,
    in_float64,
    make,
    oracle,
    output_gradients,
)

LENGTHS = (0, 3, 40, 1, 0, 31)
ON_CPU = [
    Case((2, 41, 48, 16), "2", "2", dtypes=(BF16,) * 5),
    Case((1, 300, 24, 16), "3", "24c", "dy"),  # several chunks
    Case((2, 33, 9, 3), "9c", "9t", "uz", full=False),
    Case((2, 37, 40, 16), "0", "0", "udzy", dtypes=(BF16,) * 5),
    Case((1, 75, 40, 16), "0b", "0", "udzy", lengths=LENGTHS),
    Case((2, 300, 40, 16), "4", "4", "udzy", (BF16, F32, F32, F32, BF16)),
    # Rows of whole pieces of 16 bytes, and rows of none where lanes have few channels or many.
    Case((2, 40, 40, 16), "2", "2", "udzy", (BF16,) * 5),
    Case((1, 304, 24, 16), "3", "24c", "udz"),  # several chunks
    Case((1, 80, 40, 16), "0b", "0", "udzy", (F16,) * 5, (0, 3, 40, 1, 0, 36)),
    Case((2, 36, 9, 3), "0", "0", "ud", full=False),
    Case((2, 48, 24, 1), "0", "0", "udz", (BF16,) * 5),
    Case((2, 29, 24, 1), "0", "0", "udz", (BF16,) * 5),
    Case((1, 40, 12, 64), "0", "0", "udz", (BF16,) * 5),
    Case((1, 27, 12, 64), "0", "0", "udz"),
    Case((1, 24, 5, 200), "0", "0", "udz", (BF16,) * 5),
    Case((1, 37, 40, 16), "0", "0", "uz", (BF16,) * 5),  # not all of the inputs
    # Groups of 48 channels: CTAs of one warp and of three; of 20: of one and of two.
    Case((1, 304, 96, 16), "2", "2", "udz", (BF16,) * 5),
    Case((1, 45, 60, 16), "3", "3"),
]
SHAPES = [(2, 197, 384, 16), (1, 1, 64, 16), (2, 1024, 64, 16), (1, 2500, 96, 16), (3, 65, 40, 8), (2, 130, 24, 1),
          (1, 300, 32, 64), (1, 70, 16, 200)]  # fmt: skip
SELECTIONS = [("4", "4"), ("0", "0"), ("0t", "2"), ("8", "0"), ("40c", "40c"), ("24c", "0"), ("2", "32t"), ("1", "1")]
ON_GPU = [
    Case(shape, B, C, layout, dtypes=(dtype,) * 5)
    for (shape, (B, C)), layout, dtype in itertools.product(
        zip(SHAPES, SELECTIONS, strict=True), ("", "udzy", "dz"), (F32, BF16))
] + [
    *ON_CPU,
    Case((2, 197, 64, 16), "4", "4", "udzy", (F16,) * 5),
    Case((2, 197, 64, 16), "4", "4", "udzy", (BF16, F32, BF16, BF16, BF16)),
    Case((2, 197, 64, 16), "0", "64c", "u", (BF16, BF16, F32, F16, BF16)),
    Case((1, 1000, 64, 16), "2", "2", "udzy", (BF16,) * 5, (600, 0, 400)),
    Case((1, 1000, 64, 16), "64c", "64c", "", (F32,) * 5, (600, 0, 1, 399), full=False),
]  # fmt: skip


def check(case, device, interval):
    inputs, weights = make(case, device), output_gradients(case, device)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
    arguments = [inputs.get(name) for name in names]
    test_cuda.poison(device)
    y, final, checkpoints = cuda.forward(*arguments, interval)
    test_cuda.poison(device)
    found = cuda.backward(weights[0], weights[1], *arguments, checkpoints, interval)
    y0, final0, expected = differentiate(oracle, in_float64(inputs), weights)
    limit = max(test_cuda.LIMITS[d] for d in case.dtypes)
    assert relative_error(y, y0) < limit
    assert relative_error(final, final0) < 1e-5
    assert y.dtype == inputs["u"].dtype
    assert is_transposed(y) == is_transposed(inputs["u"])
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    for name, gradient in zip(order, found, strict=True):
        if inputs.get(name) is None:
            continue
        assert relative_error(gradient, expected[name]) < limit, name
        assert gradient.dtype == inputs[name].dtype, name
        if name in ("u", "delta", "z"):
            assert is_transposed(gradient) == is_transposed(inputs[name]), name


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_the_kernels_logic(case, monkeypatch, tmp_path_factory):
    cuda_on_cpu.forget()
    cuda_on_cpu.install(monkeypatch, tmp_path_factory.getbasetemp())
    try:
        check(case, "cpu", 32)
    finally:
        cuda_on_cpu.forget()


# Gradients of (b, d, l) operands wait for their segment's end where saved states were: all three of them, or with half
# of the room those that fit. Rows are even and not, whole segments and the rest of one.
WAITING = [
    Case((2, length, 40, 16), "0", "0", layout, (dtype,) * 5)
    for (length, layout), dtype in itertools.product(((136, "udzy"), (131, "udz"), (136, "dz")), (F32, BF16))
]


def check_waiting(case, saved_every, monkeypatch, device, interval):
    plan = cuda_backward.backward_plan
    monkeypatch.setattr(cuda_backward, "backward_plan", lambda *shape: plan(*shape)._replace(save=saved_every))
    cuda_on_cpu.forget()
    try:
        check(case, device, interval)
    finally:
        cuda_on_cpu.forget()


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("saved_every", [4, 8])
@pytest.mark.parametrize("case", WAITING, ids=str)
def test_the_logic_of_gradients_that_wait(case, saved_every, monkeypatch, tmp_path_factory):
    cuda_on_cpu.install(monkeypatch, tmp_path_factory.getbasetemp())
    check_waiting(case, saved_every, monkeypatch, "cpu", 64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("saved_every", [4, 8])
@pytest.mark.parametrize("case", WAITING, ids=str)
def test_gradients_that_wait_on_a_gpu(case, saved_every, monkeypatch):
    check_waiting(case, saved_every, monkeypatch, "cuda", 64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_on_a_gpu(case):
    check(case, "cuda", 64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", [ON_GPU[0], ON_GPU[3], ON_CPU[1]], ids=str)
def test_same_inputs_same_bits(case):
    inputs, weights = make(case, "cuda"), output_gradients(case, "cuda")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
    arguments = [inputs.get(name) for name in names]
    runs = []
    for _ in range(3):
        y, final, checkpoints = cuda.forward(*arguments, 64)
        runs.append((y, final, *cuda.backward(*weights, *arguments, checkpoints, 64)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_rows_that_begin_at_multiples_of_16_bytes():
    """The kernels read and write those in vectors: one that is not would be an illegal address on a card."""

    def even(dtype, *, tokens=40, row=None, first=0, dy=None):
        row = row or tokens
        memory = torch.zeros(2 * 8 * row + 16, dtype=dtype)
        x = memory[first:].as_strided((2, tokens, 8), (8 * row, 1, row))
        B, C = torch.zeros(2, 2, tokens, 16, dtype=dtype)
        variant = cuda_launch.operands(8, 16, dtype.itemsize, B, C, u=x, delta=x, z=None, dy=dy).variant
        assert variant.transposed & 3 == 3
        return bool(variant.transposed & EVEN_ROWS)

    for dtype, whole in ((BF16, 8), (F16, 8), (F32, 4)):
        assert even(dtype)
        assert even(dtype, row=40 + whole)
        assert even(dtype, first=whole)
        assert even(dtype, dy=torch.zeros(2, 40, 9, dtype=dtype)[..., 1:]), "rows of channels have their own rule"
        assert not even(dtype, tokens=40 + whole // 2), "rows of the outputs are as long as the tokens"
        assert not even(dtype, row=40 + whole // 2)
        assert not even(dtype, first=1)
        for wrong in (
            torch.zeros(2, 8, 41, dtype=dtype)[..., :40],
            torch.zeros(2 * 8 * 40 + 1, dtype=dtype)[1:].view(2, 8, 40),
        ):
            assert not even(dtype, dy=wrong.transpose(1, 2))
    plain = torch.zeros(2, 40, 8)
    assert cuda_launch.operands(8, 16, 4, *torch.zeros(2, 2, 40, 16), u=plain, delta=plain).variant.transposed == 0
