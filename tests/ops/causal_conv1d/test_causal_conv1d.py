"""causal_conv1d: outputs, every gradient and the final state against a one-output-at-a-time float64 run."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops import causal_conv1d, causal_conv1d_
from mambakit.ops.causal_conv1d import reference
from tests.ops.closeness import relative_error

# b, l, d, k: shorter and longer than the filter, odd, one token, a filter of one tap
SHAPES = [(1, 1, 1, 4), (2, 2, 3, 4), (2, 7, 5, 3), (1, 64, 4, 2), (2, 33, 3, 8), (1, 5, 2, 1), (3, 100, 7, 4)]


def make(b, length, d, k, dtype=torch.float64, **options):
    inputs = {
        "x": torch.randn(b, length, d, dtype=dtype),
        "weight": torch.randn(d, k, dtype=dtype),
        "bias": torch.randn(d, dtype=dtype),
        "initial_state": torch.randn(b, d, k - 1, dtype=dtype),
    }
    return {**inputs, **options}


def gradients(function, inputs, weights):
    leaves = {
        k: v.clone().requires_grad_()
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    y, final = function(**{**inputs, **leaves})
    loss = (y.double() * weights[0]).sum() + (final.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return y, final, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_oracle(shape, activation):
    b, length, d, k = shape
    inputs = make(*shape, activation=activation)
    weights = torch.randn(b, length, d, dtype=torch.float64), torch.randn(b, d, k - 1, dtype=torch.float64)
    y, final, grads = gradients(causal_conv1d, inputs, weights)
    y0, final0, grads0 = gradients(reference.causal_conv1d, inputs, weights)
    assert relative_error(y, y0) < 1e-12
    assert torch.equal(final, final0)
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < 1e-12, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 5e-4)])
def test_lower_precision(dtype, tolerance):
    inputs = make(2, 33, 8, 4, dtype=dtype)
    weights = torch.randn(2, 33, 8).to(dtype).double(), torch.randn(2, 8, 3).to(dtype).double()
    y, final, grads = gradients(causal_conv1d, inputs, weights)
    y0, final0, grads0 = gradients(reference.causal_conv1d, {k: v.double() for k, v in inputs.items()}, weights)
    assert y.dtype == final.dtype == dtype
    assert relative_error(y, y0) < tolerance
    assert torch.equal(final.double(), final0)
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < tolerance, name


def test_float32_weights_with_bfloat16_inputs():
    inputs = make(2, 9, 4, 4, dtype=torch.bfloat16, weight=torch.randn(4, 4), bias=torch.randn(4))
    y, _ = causal_conv1d(**inputs)
    y0, _ = reference.causal_conv1d(**inputs)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, y0) < 3e-3


@pytest.mark.parametrize("lengths", [[5], [0, 3], [1, 0, 2, 9, 1, 33, 0]])
def test_packed_equals_separate(lengths):
    d, k = 3, 4
    total, s = sum(lengths), len(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    inputs = make(1, total, d, k, initial_state=torch.randn(s, d, k - 1, dtype=torch.float64))
    weights = torch.randn(1, total, d, dtype=torch.float64), torch.randn(s, d, k - 1, dtype=torch.float64)
    y, final, grads = gradients(lambda **kw: causal_conv1d(cu_seqlens=cu, **kw), inputs, weights)

    def separately(x, weight, bias, initial_state):
        bounds = zip(cu.tolist(), cu.tolist()[1:], strict=False)
        runs = [
            reference.causal_conv1d(x[:, i:j], weight, bias, "silu", initial_state[n : n + 1])
            for n, (i, j) in enumerate(bounds)
        ]
        return torch.cat([y for y, _ in runs], 1), torch.cat([f for _, f in runs])

    y0, final0, grads0 = gradients(separately, inputs, weights)
    assert relative_error(y, y0) < 1e-12
    assert torch.equal(final, final0)
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < 1e-12, name


def test_a_run_in_segments_equals_the_whole():
    inputs = make(2, 50, 3, 4)
    y, final = causal_conv1d(**inputs)
    state, parts = inputs["initial_state"], []
    for start, end in [(0, 1), (1, 3), (3, 4), (4, 40), (40, 50)]:
        part, state = causal_conv1d(**{**inputs, "x": inputs["x"][:, start:end], "initial_state": state})
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    assert torch.equal(state, final)


@pytest.mark.parametrize("packed", [False, True])
def test_in_place_with_slots(packed):
    inputs = make(1 if packed else 3, 9 if packed else 3, 4, 4, dtype=torch.float32)
    del inputs["initial_state"]
    cu = torch.tensor([0, 5, 6, 9], dtype=torch.int32) if packed else None
    pool = torch.randn(5, 4, 3)
    before = pool.clone()
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    start = torch.stack([pool[4], torch.zeros(4, 3), pool[0]])
    expected_y, expected = causal_conv1d(**inputs, initial_state=start, cu_seqlens=cu)
    y, state = causal_conv1d_(**inputs, state=pool, slot_indices=slots, cu_seqlens=cu)
    assert state is pool
    torch.testing.assert_close(y, expected_y)
    assert torch.equal(pool[[4, 0]], expected[[0, 2]])
    assert torch.equal(pool[[1, 2, 3]], before[[1, 2, 3]])


def test_gradcheck():
    inputs = make(2, 6, 2, 3)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    call = lambda *v: causal_conv1d(**dict(zip(leaves, v, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    inputs = make(1 if packed else 2, 9, 3, 4, dtype=torch.float32)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    state = torch.randn(2, 3, 3)
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
    torch.library.opcheck(torch.ops.mambakit.causal_conv1d, (*leaves, "silu", state.requires_grad_(), cu))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.mambakit.causal_conv1d_, (torch.randn(2, 3, 3), None, *plain, "silu", cu))
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d_backward, (plain[0], None, *plain, "silu", state.detach(), cu)
    )


def test_empty():
    y, final = causal_conv1d(**make(0, 5, 3, 4))
    assert y.shape == (0, 5, 3)
    assert final.shape == (0, 3, 3)
    inputs = make(2, 0, 3, 4)
    y, final = causal_conv1d(**inputs)
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3)}, r"expected \(b, l, d\)"),
        ({"weight": torch.zeros(3, 1, 4)}, r"squeeze"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"activation": "relu"}, "'relu' is not known"),
        ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state has shape"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make(2, 5, 3, 4, dtype=torch.float32), **change})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True], ids=["", "dy"])
def test_a_view_of_b_d_l_memory_gives_results_in_its_layout(dtype, gradient):
    inputs = make(2, 37, 6, 4, dtype=dtype)
    x, dy = (torch.randn(2, 6, 37).to(dtype).transpose(1, 2) for _ in range(2))
    dense = {**inputs, "x": x.contiguous()}

    def call(given, weight):
        leaves = [given["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()]
        y, final = causal_conv1d(**{**given, "x": leaves[0], "weight": leaves[1]})
        return y, final, *torch.autograd.grad((y, final), leaves, (weight, torch.ones_like(final)))

    found = call({**inputs, "x": x}, dy if gradient else dy.contiguous())
    assert all(t.stride(1) == 1 and t.transpose(1, 2).is_contiguous() for t in (found[0], found[2]))
    for ours, theirs in zip(found, call(dense, dy.contiguous()), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d, (x.requires_grad_(), inputs["weight"], inputs["bias"], "silu", None, None)
    )
    y, _ = causal_conv1d(x, weight := inputs["weight"].requires_grad_())
    for first in torch.autograd.grad(y.float().square().sum(), (x, weight), create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.float().sum().backward(retain_graph=True)
