"""selective_scan_fn in every form of its arguments, against a float64 loop, with every gradient."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat.selective_scan import SelectiveScanFn, selective_scan_fn, selective_scan_ref
from tests.compat.oracles import error, gradients, leaves, scan, wide

# Relative norms. float32: sums of up to l n products. Halves: one rounding of the output, or of each gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(b, d, n, length, B="group", C="group", groups=1, dtype=torch.float32, A=torch.float32):
    """u, delta, A, B, C, D, z, delta_bias."""
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def form(kind: str) -> torch.Tensor:
        if kind == "constant":
            return torch.randn(d, n, dtype=A if A.is_complex else real)
        long = length * (2 if A.is_complex else 1)
        shape = (b, n, long) if kind == "shared" else (b, groups, n, long)
        return torch.randn(shape).to(dtype)

    values = -torch.rand(d, n) - 0.1
    values = torch.complex(values, torch.randn(d, n) * 3) if A.is_complex else values.to(real)
    u, delta, z = (torch.randn(b, d, length).to(dtype) for _ in range(3))
    return [u, delta, values, form(B), form(C), torch.randn(d).to(real), z, torch.randn(d).to(real) - 2]


def check(arguments, tolerance, fn=selective_scan_fn, softplus=True):
    mine, exact = leaves(*arguments), leaves(*map(wide, arguments))
    y, state = fn(*mine, softplus, True)
    expected, last = scan(*exact, softplus)
    assert y.dtype == arguments[0].dtype
    assert y.is_contiguous()
    assert error(y, expected) < tolerance
    assert error(state, last) < tolerance
    dy = torch.randn(y.shape, dtype=torch.float64)
    names = [
        n for n, t in zip(["u", "delta", "A", "B", "C", "D", "z", "bias"], arguments, strict=True) if t is not None
    ]
    found = gradients(y, mine, dy.to(y.dtype))
    for name, value, right in zip(names, found, gradients(expected, exact, dy.to(y.dtype)), strict=True):
        assert error(value, right) < 4 * tolerance, name


@pytest.mark.parametrize("length", [1, 17, 130])
@pytest.mark.parametrize(
    ("B", "C", "groups"),
    [("shared", "shared", 1), ("group", "group", 1), ("group", "group", 3), ("constant", "constant", 1),
     ("constant", "shared", 1), ("shared", "constant", 1), ("group", "shared", 2), ("constant", "group", 2)],
)  # fmt: skip
def test_forms_of_b_and_c(B, C, groups, length):
    check(inputs(2, 6, 5, length, B, C, groups), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    check(inputs(2, 6, 5, 33, groups=2, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("B", "C"), [("shared", "shared"), ("group", "group"), ("constant", "constant")])
def test_complex_A(B, C):
    """Phases of many turns: their rounding in float32 would be seen."""
    arguments = inputs(1, 4, 3, 90, B, C, groups=2, A=torch.complex64)
    check(arguments, 2e-5)


def test_optional_arguments():
    u, delta, A, B, C, *_ = inputs(2, 6, 5, 19)
    check([u, delta.abs(), A, B, C, None, None, None], TOLERANCE[torch.float32], softplus=False)


def test_odd_layouts():
    """Channels last in memory, slices of larger tensors, steps of 2, a constant that is expanded."""
    u, delta, A, B, C, D, z, bias = inputs(2, 6, 5, 40)
    u = u.transpose(1, 2).contiguous().transpose(1, 2)
    delta = torch.cat([delta, delta], 1)[:, 3:9]
    z = torch.cat([z, z], 2)[..., ::2]
    B = B[:, 0].transpose(1, 2).contiguous().transpose(1, 2)
    C = C[:, :, :, :1].expand(-1, -1, -1, 40)
    check([u, delta, A, B, C, D, z, bias], TOLERANCE[torch.float32])


def test_mixed_dtypes_meet_in_the_widest():
    """As under autocast: half operands beside float32 ones, and half parameters."""
    u, delta, A, B, C, D, z, bias = inputs(2, 6, 5, 21)
    mixed = [u.bfloat16(), delta, A.half(), B.bfloat16(), C, D.half(), z, bias.bfloat16()]
    y = selective_scan_fn(*mixed, True)
    assert y.dtype == torch.bfloat16
    assert error(y, scan(*mixed, True)[0]) < TOLERANCE[torch.bfloat16]


def test_gradients_flow_through_the_last_state():
    arguments = inputs(2, 6, 5, 9)
    mine, exact = leaves(*arguments), leaves(*map(wide, arguments))
    (y, state), (expected, last) = selective_scan_fn(*mine, True, True), scan(*exact, True)
    found = gradients((y.sum() + state.square().sum()), mine, torch.ones(()))
    wanted = gradients(expected.sum() + last.square().sum(), exact, torch.ones(()))
    for value, right in zip(found, wanted, strict=True):
        assert error(value, right) < 2e-5


def test_a_second_derivative_raises():
    u, *rest = leaves(*inputs(1, 4, 3, 5))
    (first,) = torch.autograd.grad(selective_scan_fn(u, *rest, True).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|second"):
        first.sum().backward()


@pytest.mark.parametrize("A", [torch.float32, torch.complex64])
def test_the_reference_agrees(A):
    check(inputs(2, 4, 3, 12, groups=2, A=A), 2e-5, selective_scan_ref)


def test_apply_is_the_function():
    arguments = inputs(1, 4, 3, 5)
    assert torch.equal(SelectiveScanFn.apply(*arguments), selective_scan_fn(*arguments))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.randn(4, 5), "u has shape .*expected .b, d, l."),
        ("delta", torch.randn(1, 4, 6), "delta has shape"),
        ("A", torch.randn(3, 3), "A has shape .* d = 4 of u"),
        ("B", torch.randn(1, 2, 7, 5), "B has shape"),
        ("C", torch.randn(1, 3, 3, 5), "C has 3 groups, which do not divide the 4 channels"),
        ("C", torch.randn(4, 7), "C has shape"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    u, delta, A, B, C, *_ = inputs(1, 4, 3, 5)
    arguments = {"u": u, "delta": delta, "A": A, "B": B, "C": C} | {name: value}
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**arguments)


@pytest.mark.parametrize(("b", "length"), [(0, 5), (0, 0), (2, 0)])
@pytest.mark.parametrize("A", [torch.float32, torch.complex64])
def test_of_nothing(A, b, length):
    """No rows, or no tokens, also with B and C of real and imaginary parts."""
    arguments = inputs(b, 6, 5, length, "shared", "group", 2, A=A)
    y, state = selective_scan_fn(*arguments, True, True)
    assert y.shape == (b, 6, length)
    assert (state == 0).all()
    assert state.shape == (b, 6, 5)


def test_parts_of_complex_numbers_anywhere_in_memory():
    """From an odd place, and apart: what torch cannot view as complex numbers."""
    arguments = inputs(2, 6, 5, 7, "shared", "group", 2, A=torch.complex64)
    for place in (3, 4):
        whole = torch.zeros(*(2 * size + 1 for size in arguments[place].shape))
        part = whole[tuple(slice(1, 1 + 2 * size, 2) for size in arguments[place].shape)]
        part.copy_(arguments[place])
        arguments[place] = part
    check(arguments, 4 * TOLERANCE[torch.float32])


def test_the_reference_of_no_tokens():
    y, state = selective_scan_ref(*inputs(2, 6, 5, 0), True, True)
    assert y.shape == (2, 6, 0)
    assert (state == 0).all()
