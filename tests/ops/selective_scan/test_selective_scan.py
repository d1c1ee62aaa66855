"""selective_scan: outputs, every gradient and the final state against a token-by-token float64 run."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops import selective_scan, selective_scan_
from mambakit.ops.selective_scan import chunked, reference
from tests.ops.closeness import relative_error

# b, l, d, n: odd lengths, one token, chunk edges (32 and 128 tokens), one state, many states
SHAPES = [
    (1, 1, 1, 1), (2, 1, 3, 16), (2, 5, 3, 4), (1, 31, 2, 8), (1, 32, 2, 8), (2, 33, 5, 16), (1, 130, 4, 16),
    (1, 257, 3, 64), (1, 9, 2, 256), (3, 64, 7, 3),
]  # fmt: skip


def make(b, length, d, n, dtype=torch.float64, **options):
    """Inputs of one call; ``options`` turn optional arguments off."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "u": torch.randn(b, length, d, dtype=dtype),
        "delta": torch.randn(b, length, d, dtype=dtype),
        "A": -torch.rand(d, n, dtype=state_dtype) * 4,
        "B": torch.randn(b, length, n, dtype=dtype),
        "C": torch.randn(b, length, n, dtype=dtype),
        "D": torch.randn(d, dtype=state_dtype),
        "z": torch.randn(b, length, d, dtype=dtype),
        "delta_bias": torch.randn(d, dtype=state_dtype),
        "delta_softplus": True,
        "initial_state": torch.randn(b, d, n, dtype=state_dtype),
    }
    return {**inputs, **options}


def tensors_of(inputs):
    return {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def gradients(function, inputs, weights):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors_of(inputs).items()}
    y, final = function(**{**inputs, **leaves})
    loss = (y.double() * weights[0]).sum() + (final.double() * weights[1]).sum()
    return y, final, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_oracle(shape):
    inputs = make(*shape)
    weights = (
        torch.randn(shape[:3], dtype=torch.float64),
        torch.randn(shape[0], shape[2], shape[3], dtype=torch.float64),
    )
    y, final, grads = gradients(selective_scan, inputs, weights)
    y0, final0, grads0 = gradients(reference.selective_scan, inputs, weights)
    assert relative_error(y, y0) < 1e-12
    assert relative_error(final, final0) < 1e-12
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < 1e-11, name


# float32 arithmetic against float64: a few roundings per step. Half inputs: the output and each gradient are rounded
# once more.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_lower_precision(shape, dtype, tolerance):
    inputs = make(*shape, dtype=dtype)
    # Weights that the dtype holds exactly: else the gradient that enters is itself rounded before the op sees it.
    weights = torch.randn(shape[:3]).to(dtype).double(), torch.randn(shape[0], shape[2], shape[3]).double()
    y, final, grads = gradients(selective_scan, inputs, weights)
    y0, final0, grads0 = gradients(
        reference.selective_scan,
        {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()},
        weights,
    )
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    assert relative_error(y, y0) < tolerance
    assert relative_error(final, final0) < 1e-5
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < tolerance, name


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
def test_optional_arguments(absent):
    inputs = make(2, 37, 3, 4, **{absent: None}, delta_softplus=absent != "D")
    if absent == "D":
        inputs["delta"] = inputs["delta"].abs() * 0.1
    weights = torch.randn(2, 37, 3, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    y, final, grads = gradients(selective_scan, inputs, weights)
    y0, final0, grads0 = gradients(reference.selective_scan, inputs, weights)
    assert relative_error(y, y0) < 1e-12
    assert relative_error(final, final0) < 1e-12
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < 1e-11, name


@pytest.mark.parametrize("lengths", [[5], [0, 3], [3, 0, 1, 40, 1, 0, 33, 128, 0]])
def test_packed_equals_separate(lengths):
    d, n = 3, 4
    total, s = sum(lengths), len(lengths)
    inputs = make(1, total, d, n, initial_state=torch.randn(s, d, n, dtype=torch.float64))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    weights = torch.randn(1, total, d, dtype=torch.float64), torch.randn(s, d, n, dtype=torch.float64)
    y, final, grads = gradients(lambda **kw: selective_scan(cu_seqlens=cu, **kw), inputs, weights)

    def separately(**kw):
        ys, finals = [], []
        for i, (start, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
            cut = {name: kw[name][:, start:end] for name in ("u", "delta", "B", "C", "z")}
            if start == end:
                finals.append(kw["initial_state"][i : i + 1])
                continue
            y_i, final_i = reference.selective_scan(**{**kw, **cut, "initial_state": kw["initial_state"][i : i + 1]})
            ys.append(y_i)
            finals.append(final_i)
        return torch.cat(ys, 1), torch.cat(finals)

    y0, final0, grads0 = gradients(separately, inputs, weights)
    assert relative_error(y, y0) < 1e-12
    assert relative_error(final, final0) < 1e-12
    for name, grad in grads.items():
        assert relative_error(grad, grads0[name]) < 1e-11, name


def test_a_run_in_segments_equals_the_whole():
    inputs = make(2, 150, 3, 8, dtype=torch.float32)
    y, final = selective_scan(**inputs)
    state, parts = inputs["initial_state"], []
    for start, end in [(0, 1), (1, 2), (2, 40), (40, 149), (149, 150)]:
        cut = {name: inputs[name][:, start:end] for name in ("u", "delta", "B", "C", "z")}
        part, state = selective_scan(**{**inputs, **cut, "initial_state": state})
        parts.append(part)
    assert relative_error(torch.cat(parts, 1), y) < 1e-6
    assert relative_error(state, final) < 1e-6


def test_in_place_with_slots():
    inputs = make(3, 6, 4, 8, dtype=torch.float32)
    del inputs["initial_state"]
    pool = torch.randn(5, 4, 8)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    start = torch.stack([pool[4], torch.zeros(4, 8), pool[0]])
    expected_y, expected = selective_scan(**inputs, initial_state=start)
    before = pool.clone()
    y, state = selective_scan_(**inputs, state=pool, slot_indices=slots)
    assert state is pool
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(pool[[4, 0]], expected[[0, 2]])
    assert torch.equal(pool[[1, 2, 3]], before[[1, 2, 3]])


def test_in_place_packed():
    inputs = make(1, 10, 4, 8, dtype=torch.float32)
    del inputs["initial_state"]
    pool = torch.randn(3, 4, 8)
    cu = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    slots = torch.tensor([2, 0, -1], dtype=torch.int32)
    expected_y, expected = selective_scan(
        **inputs, initial_state=torch.stack([pool[2], pool[0], torch.zeros(4, 8)]), cu_seqlens=cu
    )
    before = pool.clone()
    y, _ = selective_scan_(**inputs, state=pool, slot_indices=slots, cu_seqlens=cu)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(pool[2], expected[0])
    assert torch.equal(pool[:2], before[:2])


def test_checkpoints_are_the_states_that_enter():
    inputs = make(2, 100, 3, 4)
    arguments = [inputs[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    _, _, checkpoints = torch.ops.mambakit.selective_scan(*arguments, True, inputs["initial_state"], None, 32)
    assert checkpoints.shape == (2, 4, 3, 4)
    for c in range(4):
        cut = {name: inputs[name][:, : c * 32] for name in ("u", "delta", "B", "C", "z")}
        _, state = reference.selective_scan(**{**inputs, **cut})
        assert relative_error(checkpoints[:, c], state) < 1e-12


def test_strided_inputs():
    wide = torch.randn(2, 20, 3 * 4 + 2 * 8)
    u, delta, z, B, C = wide.split([4, 4, 4, 8, 8], -1)
    inputs = make(2, 20, 4, 8, dtype=torch.float32, u=u, delta=delta, z=z, B=B, C=C)
    dense = {
        k: v.clone(memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }
    torch.testing.assert_close(selective_scan(**inputs), selective_scan(**dense))


def test_decays_near_one_over_a_long_row():
    """delta |A| about 1e-7: the state is a plain sum, which a float32 decay that rounds to 1 must still get right."""
    length = 4096
    u = torch.ones(1, length, 1)
    delta = torch.full((1, length, 1), 1e-7)
    A = -torch.ones(1, 1)
    B = C = torch.ones(1, length, 1)
    y, final = selective_scan(u, delta, A, B, C)
    expected, expected_final = reference.selective_scan(u, delta, A, B, C)
    assert relative_error(final, expected_final) < 2e-4  # 4096 float32 additions of 1e-7 to at most 4e-4
    assert relative_error(y, expected) < 2e-4


def test_extremes_propagate():
    inputs = make(1, 40, 2, 4, dtype=torch.float32)
    inputs["delta"][0, 3] = 1e4  # softplus passes it through, the decay underflows to 0
    inputs["delta"][0, 5] = -1e4  # a step of 0: the state stays
    y, final = selective_scan(**inputs)
    assert torch.isfinite(y).all()
    assert torch.isfinite(final).all()
    inputs["u"][0, 20, 0] = float("nan")
    y, final = selective_scan(**inputs)
    assert torch.isfinite(y[0, :20]).all()
    assert torch.isnan(y[0, 20:, 0]).all()
    assert torch.isfinite(y[0, :, 1]).all()


def test_empty_batch_and_empty_length():
    y, final = selective_scan(**make(0, 5, 3, 4, dtype=torch.float32))
    assert y.shape == (0, 5, 3)
    assert final.shape == (0, 3, 4)
    inputs = make(2, 0, 3, 4, dtype=torch.float32)
    y, final = selective_scan(**inputs)
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, inputs["initial_state"])


def test_gradcheck():
    inputs = make(2, 7, 2, 3)
    leaves = {k: v.requires_grad_() for k, v in tensors_of(inputs).items()}
    call = lambda *v: selective_scan(**{**inputs, **dict(zip(leaves, v, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_gradcheck_packed():
    cu = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    inputs = make(1, 7, 2, 3, initial_state=torch.randn(3, 2, 3, dtype=torch.float64), cu_seqlens=cu)
    leaves = {k: v.requires_grad_() for k, v in tensors_of(inputs).items()}
    call = lambda *v: selective_scan(**{**inputs, **dict(zip(leaves, v, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_the_gradient_bounds_its_memory(monkeypatch):
    """Groups of chunks give the same gradient as all chunks at once."""
    inputs = make(1, 200, 2, 3)
    weights = torch.randn(1, 200, 2, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    _, _, whole = gradients(selective_scan, inputs, weights)
    monkeypatch.setattr(chunked, "_GROUP_ELEMENTS", 1)
    _, _, grouped = gradients(selective_scan, inputs, weights)
    for name, grad in grouped.items():
        assert relative_error(grad, whole[name]) < 1e-12, name


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    inputs = make(1 if packed else 2, 9, 3, 4, dtype=torch.float32)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    inputs["initial_state"] = torch.randn(2, 3, 4)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [inputs[k].requires_grad_() for k in names]
    torch.library.opcheck(
        torch.ops.mambakit.selective_scan, (*leaves, True, inputs["initial_state"].requires_grad_(), cu, 32)
    )
    plain = [inputs[k].detach() for k in names]
    pool = torch.randn(3, 3, 4)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.mambakit.selective_scan_, (pool, slots, *plain, True, cu))
    _, _, checkpoints = torch.ops.mambakit.selective_scan(*plain, True, inputs["initial_state"].detach(), cu, 32)
    torch.library.opcheck(
        torch.ops.mambakit.selective_scan_backward,
        (plain[0], None, *plain, True, inputs["initial_state"].detach(), cu, checkpoints, 32),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 5, 4)}, r"delta has shape \(2, 5, 4\)"),
        ({"A": torch.zeros(4, 4)}, r"A has shape \(4, 4\)"),
        ({"B": torch.zeros(2, 4, 4)}, r"B has shape"),
        ({"D": torch.zeros(4)}, r"D has shape"),
        ({"z": torch.zeros(2, 5, 2)}, r"z has shape"),
        ({"initial_state": torch.zeros(2, 3, 5)}, r"initial_state has shape"),
        ({"u": torch.zeros(5, 3)}, r"u has shape \(5, 3\), expected \(b, l, d\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "the batch is 2"),
    ],
)
def test_shapes_are_checked(change, message):
    inputs = make(2, 5, 3, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change})


def test_dtypes_and_packed_bounds_are_checked():
    inputs = make(1, 5, 3, 4, dtype=torch.float32, initial_state=None)
    for name in ("u", "delta", "A", "B", "D"):
        with pytest.raises(TypeError, match=f"{name} is torch.int64"):
            selective_scan(**{**inputs, name: inputs[name].long()})
    with pytest.raises(TypeError, match="B is torch.complex64, expected float32"):
        selective_scan(**{**inputs, "B": inputs["B"].to(torch.complex64)})
    for bad in ([0, 3], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="rise from 0"):
            selective_scan(**inputs, cu_seqlens=torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(TypeError, match="cu_seqlens is torch.int64"):
        selective_scan(**inputs, cu_seqlens=torch.tensor([0, 5]))


def test_in_place_is_for_inference_and_checks_slots():
    inputs = make(2, 5, 3, 4, dtype=torch.float32)
    del inputs["initial_state"]
    with pytest.raises(RuntimeError, match="inference"):
        selective_scan_(**{**inputs, "u": inputs["u"].requires_grad_()}, state=torch.zeros(2, 3, 4))
    inputs["u"] = inputs["u"].detach()
    with pytest.raises(ValueError, match="only 1 states"):
        selective_scan_(**inputs, state=torch.zeros(1, 3, 4))
    for slots, message in (([0, 2], "past the pool"), ([1, 1], "twice")):
        with pytest.raises(ValueError, match=message):
            selective_scan_(**inputs, state=torch.zeros(2, 3, 4), slot_indices=torch.tensor(slots, dtype=torch.int32))
