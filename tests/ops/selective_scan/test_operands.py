"""Groups, constants, (b, d, l) memory, mixed dtypes and complex A: outputs, every gradient and the final state."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.ops import selective_scan, selective_scan_
from mambakit.ops._layout import is_transposed
from mambakit.ops.selective_scan import reference
from tests.ops.closeness import relative_error
from tests.ops.selective_scan.operands import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    differentiate,
    in_float64,
    make,
    oracle,
    output_gradients,
)

SELECTIONS = [
    ("1", "1"), ("2", "2"), ("3", "0"), ("0", "6"), ("6", "6"), ("0t", "0"), ("0", "0c"), ("6t", "2"), ("6c", "6c"),
    ("6c", "0"), ("3c", "2b"), ("0b", "0b"), ("2", "6t"),
]  # fmt: skip
CASES = (
    [Case((2, 37, 6, 4), B, C) for B, C in SELECTIONS]
    + [Case((1, 75, 6, 5), B, C, lengths=(0, 3, 40, 1, 0, 31)) for B, C in (("2", "2"), ("6c", "3"), ("0", "0t"))]
    + [Case((3, 1, 6, 4), B, C) for B, C in (("2", "2"), ("6c", "6c"), ("6c", "2"), ("3", "2c"))]
    + [Case((2, 37, 6, 4), t, t, layout) for t, layout in (("0", "udzy"), ("3", "dy"), ("6c", "uz"), ("2", "udz"))]
    + [Case((1, 75, 6, 5), "0", "0", "udzy", lengths=(0, 3, 40, 1, 0, 31)), Case((2, 40, 1, 4), "0", "0", "udzy")]
    # One state, tokens adjacent: a kernel of its own on a CPU.
    + [Case((2, 37, 40, 1), B, C, "udzy") for B, C in (("0", "0"), ("4", "40c"), ("40c", "2"), ("40t", "0"))]
    + [
        Case((1, 1100, 6, 1), "0", "2", "udzy"),
        Case((2, 40, 3, 1), "0", "0", "udzy"),
        Case((3, 1, 6, 1), "2", "2", "udzy"),
    ]
    + [Case((1, 75, 6, 1), B, "0", "udzy", lengths=(0, 3, 40, 1, 0, 31)) for B in ("0", "6c")]
    + [Case((2, 33, 40, 16), "4", "4", "udzy", full=False), Case((2, 33, 40, 16), "40c", "40c", full=False)]
)


def check(function, case, tolerance, dtype=None):
    inputs, weights = make(case), output_gradients(case, dtype=dtype)
    y, final, gradients = differentiate(function, inputs, weights)
    y0, final0, gradients0 = differentiate(oracle, in_float64(inputs), weights)
    assert y.dtype == inputs["u"].dtype
    assert is_transposed(y) == is_transposed(inputs["u"])
    assert relative_error(y, y0) < tolerance
    assert relative_error(final, final0) < max(1e-5 if tolerance > 1e-9 else 0, tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name
        assert relative_error(gradient, gradients0[name]) < 10 * tolerance, name
        if name in ("u", "delta", "z"):
            assert is_transposed(gradient) == is_transposed(inputs[name]), name
            assert gradient.is_contiguous() or gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_the_oracle(case):
    check(selective_scan, case._replace(dtypes=(F64,) * 5), 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check(selective_scan, case, 1e-6)  # a few roundings of 6e-8 per step


# A result is rounded to its dtype, which alone is 1.7e-3 (bfloat16) or 2e-4 (float16); gradients get ten times that.
@pytest.mark.parametrize(("dtypes", "tolerance"), [
    ((BF16,) * 5, 2e-3), ((F16,) * 5, 3e-4), ((BF16, F32, BF16, BF16, BF16), 2e-3),
    ((BF16, BF16, F32, BF16, BF16), 2e-3), ((F16, F32, F32, F32, F16), 3e-4), ((F32, BF16, F32, F16, BF16), 2e-3),
    ((BF16, F64, BF16, BF16, F32), 2e-3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", [
    Case((2, 37, 6, 4)), Case((2, 37, 6, 4), "2", "6c", "dz"), Case((2, 37, 40, 16), "0", "0", "udzy"),
    Case((2, 37, 40, 1), "0", "4", "udzy"),
], ids=str)  # fmt: skip
def test_dtypes(case, dtypes, tolerance):
    check(selective_scan, case._replace(dtypes=dtypes), tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_state_of_adjacent_tokens_has_a_rows_bits_in_any_batch(dtype):
    inputs = make(Case((3, 77, 6, 1), transposed="udzy", dtypes=(dtype,) * 5))
    y, final = selective_scan(**inputs)
    for i in range(3):
        rows = {name: inputs[name][i : i + 1] for name in ("u", "delta", "B", "C", "z", "initial_state")}
        found, last = selective_scan(**inputs | rows)
        assert is_transposed(found)
        assert torch.equal(found, y[i : i + 1])
        assert torch.equal(last, final[i : i + 1])


def test_parameters_of_any_dtype_are_cast():
    case = Case((2, 9, 6, 4), dtypes=(BF16,) * 5)
    inputs = make(case)
    halves = {name: inputs[name].bfloat16().requires_grad_() for name in ("A", "D", "delta_bias", "initial_state")}
    y, final = selective_scan(**{**inputs, **halves})
    y0, final0 = selective_scan(**{**inputs, **{name: t.detach().float() for name, t in halves.items()}})
    assert torch.equal(y, y0)
    assert torch.equal(final, final0)
    (y.float().sum() + final.sum()).backward()
    assert all(t.grad.dtype == BF16 and t.grad.isfinite().all() for t in halves.values())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("which", ["channels and time", "channels", "time", "batch"])
def test_an_expanded_tensor_is_read_where_it_is(which, dtype):
    """Upstream's (d, n) constants; its gradient is that of the tensor that was expanded."""
    b, length, d, n = 2, 37, 6, 4
    start, shape = {
        "channels and time": ((n,), (b, length, d, n)),
        "channels": ((b, length, 1, n), (b, length, d, n)),
        "time": ((d, n), (b, length, d, n)),
        "batch": ((length, n), (b, length, n)),
    }[which]
    inputs = make(Case((b, length, d, n), dtypes=(dtype,) * 5))
    given = {name: torch.randn(start, dtype=dtype) for name in ("B", "C")}
    weights = output_gradients(Case((b, length, d, n), dtypes=(dtype,) * 5))

    def call(function):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        y, final = function(**{**inputs, **{name: t.expand(shape) for name, t in leaves.items()}})
        torch.autograd.backward((y, final), [w.to(o.dtype) for w, o in zip(weights, (y, final), strict=True)])
        return y, leaves["B"].grad, leaves["C"].grad

    for got, expected in zip(call(selective_scan), call(reference.selective_scan), strict=True):
        assert relative_error(got, expected) < (1e-5 if dtype == F32 else 1e-12)


def test_a_constant_takes_no_memory_of_b_l_d_n():
    b, length, d, n = 2, 64, 64, 16
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found = (t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor))
            largest.extend(t.untyped_storage().nbytes() // t.element_size() for t in found)
            return out

    inputs = make(Case((b, length, d, n), "0", "0"))
    B, C = (torch.randn(d, n, requires_grad=True) for _ in range(2))
    with Watch():
        y, _ = selective_scan(
            **{**inputs, "B": B.expand(b, length, d, n), "C": C[None, None], "u": inputs["u"].requires_grad_()}
        )
        y.sum().backward()
    assert B.grad.shape == C.grad.shape == (d, n)
    assert max(largest) < b * length * d * n // 4


def test_in_place():
    for case in (
        Case((3, 6, 6, 8), "2", "6c", "u"), Case((3, 1, 6, 8), "0", "3"), Case((3, 6, 6, 8), "0", "0", "udz"),
        Case((3, 1, 6, 8), "6c", "2"),
    ):  # fmt: skip
        inputs = make(case)
        pool, slots = torch.randn(5, 6, 8), torch.tensor([4, -1, 0], dtype=torch.int32)
        start = torch.stack([pool[4], torch.zeros(6, 8), pool[0]])
        y0, final0 = oracle(**{**inputs, "initial_state": start})
        del inputs["initial_state"]
        y, _ = selective_scan_(**inputs, state=pool, slot_indices=slots)
        assert is_transposed(y) == is_transposed(inputs["u"])
        assert relative_error(y, y0) < 1e-6
        assert relative_error(pool[[4, 0]], final0[[0, 2]]) < 1e-6


@pytest.mark.parametrize("case", [Case((2, 9, 6, 4), "2", "6c", "uz"), Case((2, 9, 6, 4), "0", "0", "udz")], ids=str)
def test_opcheck(case):
    inputs = make(case)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [inputs[name].requires_grad_() for name in names]
    state = inputs["initial_state"].requires_grad_()
    torch.library.opcheck(torch.ops.mambakit.selective_scan, (*leaves, True, state, None, 32))


@pytest.mark.parametrize("case", [Case((2, 9, 6, 4), "2", "6c", "uz"), Case((2, 9, 6, 4), "0", "0", "udz")], ids=str)
def test_compiled_whole(case):
    inputs, weights = make(case), output_gradients(case)
    inputs["C"] = torch.randn(6, 4)

    def call(**kw):
        return selective_scan(**{**kw, "C": kw["C"].expand(2, 9, 6, 4)})

    expected = differentiate(call, inputs, weights)
    torch._dynamo.reset()
    found = differentiate(torch.compile(call, backend="aot_eager", fullgraph=True), inputs, weights)
    assert torch.equal(found[0], expected[0])
    for name, gradient in found[2].items():
        assert relative_error(gradient, expected[2][name]) < 1e-6, name


@pytest.mark.parametrize("case", [
    Case((2, 7, 6, 3), "2", "6c", "ud"), Case((2, 7, 6, 3), "0", "0", "udzy"),
    Case((2, 7, 6, 3), dtypes=(BF16, F32, F32, BF16, BF16)),
], ids=str)  # fmt: skip
def test_a_second_derivative_raises(case):
    inputs = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in make(case).items()}
    y, _ = selective_scan(**inputs)
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    for gradient in torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match=r"no second derivative.*chunked\.forward"):
            gradient.float().sum().backward(retain_graph=True)


# -- complex A ---------------------------------------------------------------------------------------------------------


def complex_inputs(case: Case, dtype: torch.dtype, real_selection: bool) -> dict:
    inputs = make(case)
    pair = lambda x: torch.complex(x.double(), torch.randn(x.shape).double()).to(dtype)  # noqa: E731
    inputs["A"] = torch.complex(inputs["A"].double(), torch.randn(inputs["A"].shape).double() * 3).to(dtype)
    inputs["initial_state"] = pair(inputs["initial_state"])
    if not real_selection:
        inputs["B"], inputs["C"] = pair(inputs["B"]), pair(inputs["C"])
    return inputs


@pytest.mark.parametrize("real_selection", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex128, 1e-12), (torch.complex64, 5e-6)])
@pytest.mark.parametrize("case", [
    Case((2, 37, 6, 4)), Case((2, 130, 6, 4), "2", "6c", "uz"), Case((1, 75, 6, 5), lengths=(0, 3, 40, 1, 0, 31)),
], ids=str)  # fmt: skip
def test_complex_A(case, dtype, tolerance, real_selection):
    inputs = complex_inputs(case, dtype, real_selection)
    b, _, d, n = case.shape
    rows = b if case.lengths is None else len(case.lengths)
    weights = output_gradients(case)[0], torch.randn(rows, d, n, 2)
    y, final, gradients = differentiate(selective_scan, inputs, weights)
    y0, final0, gradients0 = differentiate(oracle, in_float64(inputs), weights)
    assert y.dtype == F32
    assert final.dtype == dtype
    assert relative_error(y, y0) < max(tolerance, 1e-7)  # y has u's dtype
    assert relative_error(torch.view_as_real(final), torch.view_as_real(final0)) < tolerance
    for name, gradient in gradients.items():
        expected = gradients0[name]
        assert gradient.dtype == inputs[name].dtype, name
        if gradient.is_complex():
            gradient, expected = torch.view_as_real(gradient), torch.view_as_real(expected)
        assert relative_error(gradient, expected) < max(10 * tolerance, 1e-6), name


def test_a_complex_A_is_half_of_conjugate_pairs():
    """Its outputs are those of the pairs."""
    inputs = complex_inputs(Case((2, 9, 3, 4), dtypes=(F64,) * 5), torch.complex128, False)
    y, _ = selective_scan(**inputs)
    pairs = {k: torch.cat([inputs[k], inputs[k].conj()], -1) for k in ("A", "B", "C", "initial_state")}
    twice, _ = selective_scan(**{**inputs, **pairs})
    u, D, z = inputs["u"], inputs["D"], inputs["z"]
    skip = D * u * torch.nn.functional.silu(z)
    assert relative_error((twice - skip) / 2, y - skip) < 1e-12


def test_complex_A_in_place_names_the_alternative():
    inputs = complex_inputs(Case((2, 9, 3, 4)), torch.complex64, False)
    state = inputs.pop("initial_state")
    with pytest.raises(TypeError, match="A is torch.complex64, expected a real dtype; selective_scan takes"):
        selective_scan_(**inputs, state=state)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"B": torch.zeros(2, 4, 5)}, r"B has shape \(2, 4, 5\), expected \(b, l, n\) = \(2, 5, 4\)"),
    ({"B": torch.zeros(6, 4)}, r"pass a constant \(d, n\) as x\[None, None\]"),
    ({"C": torch.zeros(2, 5, 4, 4)}, "C has 4 groups, and the 6 channels of u are no multiple"),
    ({"C": torch.zeros(2, 5, 0, 4)}, "C has 0 groups"),
    ({"B": torch.zeros(2, 5, 2, 4), "C": torch.zeros(2, 5, 3, 4)}, "B has 2 groups and C has 3"),
    ({"B": torch.zeros(2, 2, 5, 4)}, "B has shape"),
    ({"B": torch.zeros(3, 5, 4)}, "B has shape"),
], ids=str)  # fmt: skip
def test_shapes_are_checked(change, message):
    inputs = make(Case((2, 5, 6, 4)))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change})


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("groups", "n"), [(None, 5), (1, 5), (3, 16), (3, 1)])
@pytest.mark.parametrize("expanded", ["B", "C", "BC"])
def test_states_that_are_one_in_memory(expanded, groups, n, dtype):
    """B or C expanded over the states, tokens adjacent: what lies beside a number is the next token, and no state."""
    b, length, d = 2, 17, 6
    case = Case((b, length, d, n), "0", "0", dtypes=(dtype,) * 5)
    inputs, weights = make(case), output_gradients(case)
    shape = (b, n, length) if groups is None else (b, groups, n, length)
    for name in expanded:
        inputs[name] = torch.randn(*shape[:-2], 1, length).to(dtype)

    def call(**given):
        for name in expanded:
            whole = given[name].expand(shape)
            given[name] = whole.transpose(1, 2) if groups is None else whole.permute(0, 3, 1, 2)
        return selective_scan(**given)

    def call_dense(**given):
        return call(**{name: t.repeat_interleave(n, -2) if name in expanded else t for name, t in given.items()})

    found, right = (differentiate(function, inputs, weights) for function in (call, call_dense))
    for value, expected in zip(found[:2], right[:2], strict=True):
        assert relative_error(value, expected) < 1e-6
    for name, gradient in found[2].items():
        assert relative_error(gradient, right[2][name]) < 1e-6, name
