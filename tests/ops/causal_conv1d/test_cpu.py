"""The convolution kernels against the float64 reference: outputs, final state and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from mambakit.ops._layout import is_transposed
from mambakit.ops.causal_conv1d import chunked
from mambakit.ops.causal_conv1d import cpu as conv
from tests.ops.closeness import relative_error
from tests.ops.selective_scan.test_cpu import TOLERANCE, exact, poison


def make(b, length, d, k, dtype=torch.float32, optional=True, activation="silu", rows=None):
    wide = torch.randn(b, length, d + 7).to(dtype)
    return [
        wide[..., 3 : 3 + d], torch.randn(d, k), torch.randn(d) if optional else None, activation,
        torch.randn(rows or b, d, k - 1).to(dtype) if optional else None,
    ]  # fmt: skip


def assert_close(inputs, cu=None):
    poison()
    dtype = inputs[0].dtype
    y, final = conv.forward(*inputs, cu)
    want, want_final = chunked.forward(*exact(inputs), cu)
    assert relative_error(y, want) < TOLERANCE[dtype]
    assert torch.equal(final.double(), want_final)  # copies of inputs
    weights = torch.randn(y.shape).to(dtype), torch.randn(final.shape).to(dtype)
    gradient = conv.backward(*weights, *inputs, cu)
    for i, expected in enumerate(chunked.backward(*exact(weights), *exact(inputs), cu)):
        assert relative_error(gradient[i], expected) < (1e-5 if i in (1, 2) else TOLERANCE[dtype]), i


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", range(2, 9))
def test_against_float64(isa, k, dtype):
    for b, length, d in ((1, 1, 1), (2, 1, 70), (2, 3, 17), (1, 33, 131), (3, 70, 16)):
        assert_close(make(b, length, d, k, dtype))


def test_without_optional_arguments(isa):
    for activation in ("", "silu"):
        assert_close(make(2, 41, 19, 4, optional=False, activation=activation))


def test_packed(isa):
    cu = torch.tensor([0, 0, 3, 64, 64, 65, 101], dtype=torch.int32)
    assert_close(make(1, 101, 18, 4, rows=6), cu)


def test_in_place(isa):
    for length, state_dtype in itertools.product((1, 2, 40), (torch.float32, torch.bfloat16)):
        x, weight, bias, activation, _ = make(3, length, 21, 4, torch.bfloat16)
        pool = torch.randn(5, 21, 3).to(state_dtype)
        before = pool.clone()
        slots = torch.tensor([4, -1, 0], dtype=torch.int32)
        start = torch.stack([pool[4], torch.zeros(21, 3).to(state_dtype), pool[0]])
        y, final = chunked.forward(*exact([x, weight, bias, activation, start]), None)
        got = conv.forward_(pool, slots, x, weight, bias, activation, None)
        assert relative_error(got, y) < TOLERANCE[torch.bfloat16]
        assert torch.equal(pool[[4, 0]].double(), final[[0, 2]])
        assert torch.equal(pool[1:4], before[1:4])


def test_a_row_alone_is_the_row_of_a_batch(isa):
    x, *rest, initial = make(3, 37, 50, 4)
    y, final = conv.forward(x, *rest, initial, None)
    for row in range(3):
        alone = conv.forward(x[row : row + 1], *rest, initial[row : row + 1], None)
        assert torch.equal(alone[0], y[row : row + 1])
        assert torch.equal(alone[1], final[row : row + 1])


def test_what_is_not_finite_propagates(isa):
    for value in (float("nan"), float("inf"), float("-inf")):
        x, *rest = make(1, 40, 18, 4)
        x = x.clone()
        x[0, 20, 3] = value
        y, _ = conv.forward(x, *rest, None)
        want, _ = chunked.forward(x, *rest, None)
        assert torch.equal(torch.isnan(y), torch.isnan(want))
        assert torch.equal(torch.isinf(y), torch.isinf(want))


def test_empty(isa):
    y, final = conv.forward(*make(0, 5, 3, 4), None)
    assert y.shape == (0, 5, 3)
    inputs = make(2, 0, 3, 4)
    y, final = conv.forward(*inputs, None)
    assert torch.equal(final, inputs[-1])


def transposed(x):
    """The same values as a view of (b, d, l) memory, which has room between its channels."""
    b, length, d = x.shape
    wide = torch.full((b, d, length + 5), float("nan"), dtype=x.dtype)
    wide[..., 3 : 3 + length] = x.transpose(1, 2)
    return wide[..., 3 : 3 + length].transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [2, 4, 8])
def test_tokens_that_are_adjacent(isa, k, dtype):
    for b, length, d, options in (
        (2, 3, 17, {}), (1, 33, 131, {}), (3, 70, 16, {"optional": False}), (1, 1100, 5, {}), (2, 512, 3, {}),
        (2, 2, 9, {"activation": ""}),
    ):  # fmt: skip
        inputs = make(b, length, d, k, dtype, **options)
        inputs[0] = transposed(inputs[0])
        assert_close(inputs)
        assert is_transposed(conv.forward(*inputs, None)[0])
        dy = torch.randn(b, length, d).to(dtype)
        found = conv.backward(transposed(dy), None, *inputs, None)  # of either layout
        for ours, theirs in zip(found, conv.backward(dy, None, *inputs, None), strict=True):
            assert torch.equal(ours, theirs)
        assert is_transposed(found[0])


def test_packed_tokens_that_are_adjacent(isa):
    cu = torch.tensor([0, 0, 3, 64, 64, 65, 701], dtype=torch.int32)
    inputs = make(1, 701, 19, 4, rows=6)
    inputs[0] = transposed(inputs[0])
    assert_close(inputs, cu)


def test_in_place_where_tokens_are_adjacent(isa):
    x, weight, bias, activation, _ = make(3, 9, 19, 4)
    ours, slots = torch.randn(5, 19, 3), torch.tensor([4, -1, 0], dtype=torch.int32)
    theirs = ours.clone()
    y = conv.forward_(ours, slots, transposed(x), weight, bias, activation, None)
    want = chunked.forward_(theirs, slots, x, weight, bias, activation, None)
    assert relative_error(y, want) < 1e-6
    assert torch.equal(ours, theirs)
