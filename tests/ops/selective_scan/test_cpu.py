"""The scan kernels against the float64 reference: outputs, checkpoints, final state and every gradient."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.selective_scan import chunked, reference
from mambakit.ops.selective_scan import cpu as scan
from tests.ops.closeness import relative_error

# b, l, d, n: one token, a few (the decode kernel takes up to 4), tile edges (32), checkpoint edges, channel tails
SHAPES = [
    (1, 1, 1, 1), (2, 1, 70, 16), (3, 2, 33, 17), (2, 4, 17, 8), (2, 5, 3, 4), (1, 33, 131, 16), (2, 64, 16, 5),
    (1, 129, 20, 64), (1, 300, 9, 16), (1, 37, 5, 256),
]  # fmt: skip
# float32 against float64: a few roundings per token. Half inputs: each result is rounded once more, to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial")


def make(b, length, d, n, dtype=torch.float32, optional=True, rows=None):
    """u, delta, A, B, C, D, z, bias, softplus, initial: z, B and C as slices of a wider projection."""
    wide = torch.randn(b, length, 2 * d + 3).to(dtype)
    projected = torch.randn(b, length, 5 + 2 * n).to(dtype)
    return [
        torch.randn(b, length, d).to(dtype), wide[..., 1 : d + 1], -torch.rand(d, n) * 4,
        projected[..., 5 : 5 + n], projected[..., 5 + n :],
        torch.randn(d) if optional else None, wide[..., d + 2 : 2 * d + 2] if optional else None,
        torch.randn(d) if optional else None, True, torch.randn(rows or b, d, n) if optional else None,
    ]  # fmt: skip


def exact(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def poison():
    """Leave NaN in memory that the allocator is likely to hand out next."""
    for size in (2**8, 2**12, 2**16):
        torch.full((size,), float("nan"))


def both(inputs, cu=None, interval=32, weights=None):
    poison()
    forward = scan.forward(*inputs, cu, interval)
    expected = chunked.forward(*exact(inputs), cu, interval)
    if weights is None:
        weights = torch.randn(inputs[0].shape).to(inputs[0].dtype), torch.randn(forward[1].shape)
    poison()
    gradient = scan.backward(*weights, *inputs, cu, forward[2], interval)
    expected_gradient = chunked.backward(*exact(weights), *exact(inputs), cu, expected[2], interval)
    return forward, expected, gradient, expected_gradient


def assert_close(inputs, cu=None, interval=32):
    forward, expected, gradient, expected_gradient = both(inputs, cu, interval)
    dtype = inputs[0].dtype
    tolerance = TOLERANCE[dtype]
    assert forward[0].dtype == dtype
    assert relative_error(forward[0], expected[0]) < tolerance
    assert relative_error(forward[1], expected[1]) < 1e-5
    assert relative_error(forward[2], expected[2]) < 1e-5
    for name, got, want in zip(GRADIENTS, gradient, expected_gradient, strict=True):
        bound = tolerance if name in ("du", "ddelta", "dB", "dC", "dz") else 1e-5
        assert relative_error(got, want) < bound, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(isa, shape, dtype):
    assert_close(make(*shape, dtype=dtype))


def test_without_optional_arguments(isa):
    assert_close(make(2, 41, 19, 16, optional=False))


@pytest.mark.parametrize("interval", [32, 64, 128, 256])
def test_packed_and_every_interval(isa, interval):
    cu = torch.tensor([0, 0, 3, 64, 64, 65, 200, 256, 301], dtype=torch.int32)
    assert_close(make(1, 301, 18, 16, rows=8), cu, interval)


def test_in_place_is_the_forward_and_spares_other_slots(isa):
    for length in (1, 3, 40):
        inputs = make(3, length, 21, 16)[:9]
        pool = torch.randn(5, 21, 16)
        before = pool.clone()
        slots = torch.tensor([4, -1, 0], dtype=torch.int32)
        start = torch.stack([pool[4], torch.zeros(21, 16), pool[0]])
        y, final, _ = chunked.forward(*exact(inputs), start.double(), None, 0)
        got = scan.forward_(pool, slots, *inputs, None)
        assert relative_error(got, y) < 1e-5
        assert relative_error(pool[[4, 0]], final[[0, 2]]) < 1e-5
        assert torch.equal(pool[1:4], before[1:4])


@pytest.mark.parametrize("length", [1, 4, 5, 70])
def test_a_row_alone_is_the_row_of_a_batch(isa, length):
    inputs = make(4, length, 50, 16)
    y, final, _ = scan.forward(*inputs, None, 0)
    for row in range(4):
        cut = [v[row : row + 1] if isinstance(v, torch.Tensor) and v.dim() == 3 else v for v in inputs]
        alone, alone_final, _ = scan.forward(*cut, None, 0)
        assert torch.equal(alone, y[row : row + 1])
        assert torch.equal(alone_final, final[row : row + 1])


def test_the_number_of_threads_changes_no_bit(isa):
    inputs = make(2, 100, 300, 16)
    weights = torch.randn(2, 100, 300), torch.randn(2, 300, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            forward, _, gradient, _ = both(inputs, weights=weights)
            results.append([*forward, *gradient])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_steps_from_vanishing_to_huge(isa):
    """softplus to 1e-6 relative, very negative steps included; a huge step empties the state."""
    length = 400
    u, A = torch.ones(1, length, 1), -torch.ones(1, 1)
    B = C = torch.ones(1, length, 1)
    raw = torch.linspace(-80, 30, length).reshape(1, length, 1)
    absent = [None, None, None, True]
    for t in range(length):  # one step from a zero state: y = softplus(raw), nothing summed
        cut = [v[:, t : t + 1] for v in (u, raw)]
        y, _, _ = scan.forward(*cut, A, B[:, :1], C[:, :1], *absent, None, None, 0)
        want = torch.nn.functional.softplus(raw[:, t].double())
        assert ((y - want).abs() / want).max() < 1e-6, raw[0, t]
    huge = torch.tensor([1.0, 1e4, 3e38, -1e4]).reshape(1, 4, 1)
    y, _, _ = scan.forward(u[:, :4], huge, A, B[:, :4], C[:, :4], *absent, None, None, 0)
    want, _ = reference.selective_scan(u[:, :4], huge, A, B[:, :4], C[:, :4], delta_softplus=True)
    torch.testing.assert_close(y, want.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("length", [4, 40])
def test_what_is_not_finite_propagates_as_in_the_reference(isa, argument, value, length):
    inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in make(1, length, 18, 16)]
    inputs[argument][0, length // 2, 1] = value
    y, final, _ = scan.forward(*inputs, None, 0)
    want, want_final, _ = chunked.forward(*inputs, None, 0)
    # `chunked` carries a state over chunks, where infinity times a decay of 0 may be NaN: not finite is what counts.
    assert torch.equal(torch.isfinite(y), torch.isfinite(want))
    assert torch.equal(torch.isfinite(final), torch.isfinite(want_final))


def test_empty(isa):
    y, final, _ = scan.forward(*make(0, 5, 3, 4), None, 0)
    assert y.shape == (0, 5, 3)
    assert final.shape == (0, 3, 4)
    inputs = make(2, 0, 3, 4)
    y, final, checkpoints = scan.forward(*inputs, None, 32)
    assert torch.equal(final, inputs[-1])
    weights = torch.randn(2, 0, 3), torch.randn(2, 3, 4)
    gradient = scan.backward(*weights, *inputs, None, checkpoints, 32)
    assert torch.equal(gradient[-1], weights[1])
    assert not gradient[2].any()
