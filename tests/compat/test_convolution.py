"""causal_conv1d's functions against a float64 loop: packed rows, states in and out, circular buffers, slots."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat.convolution import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
)
from tests.compat.oracles import convolution, error, gradients, leaves, wide

# One rounding of the output, or of each gradient.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(b=2, d=6, k=4, length=17, dtype=torch.float32):
    return torch.randn(b, d, length).to(dtype), torch.randn(d, k).to(dtype), torch.randn(d).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("k", "length", "activation"), [(4, 17, "silu"), (2, 1, "swish"), (3, 2, None), (5, 9, None)])
def test_values_and_gradients(k, length, activation, dtype):
    arguments = inputs(k=k, length=length, dtype=dtype)
    for fn in (causal_conv1d_fn, causal_conv1d_ref):
        mine, exact = leaves(*arguments), leaves(*map(wide, arguments))
        y, expected = fn(*mine, activation=activation), convolution(*exact, activation)
        assert y.dtype == dtype
        # PyTorch's convolution rounds its output to the dtype before the activation.
        tolerance = TOLERANCE[dtype] * (1 if fn is causal_conv1d_fn else 4)
        assert error(y, expected) < tolerance
        dy = torch.randn(y.shape).to(dtype)
        for found, right in zip(gradients(y, mine, dy), gradients(expected, exact, dy), strict=True):
            assert error(found, right) < 2 * tolerance


def test_states_in_and_out_make_the_whole():
    x, weight, bias = inputs(length=20)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    first, state = causal_conv1d_fn(x[..., :9], weight, bias, return_final_states=True, activation="silu")
    out = torch.empty_like(state)
    second, last = causal_conv1d_fn(
        x[..., 9:], weight, bias, initial_states=state, return_final_states=True, final_states_out=out,
        activation="silu",
    )  # fmt: skip
    assert error(torch.cat([first, second], -1), whole) < 2e-7
    assert last is out
    assert torch.equal(last, x[..., -3:])
    held = torch.empty_like(state)
    causal_conv1d_fn(x, weight, bias, final_states_out=held)
    assert torch.equal(held, x[..., -3:])


def test_gradients_of_the_initial_states():
    x, weight, bias = inputs()
    mine = leaves(x, weight, bias, torch.randn(2, 6, 3))
    exact = leaves(*map(wide, mine))
    y = causal_conv1d_fn(*mine[:3], initial_states=mine[3], activation="silu")
    expected = convolution(*exact[:3], "silu", exact[3])
    dy = torch.randn(y.shape)
    for found, right in zip(gradients(y, mine, dy), gradients(expected, exact, dy), strict=True):
        assert error(found, right) < 4e-6


def test_packed_rows():
    """Sequences are runs of equal numbers, of any numbers; negative ones are padding."""
    x, weight, bias = inputs(length=12)
    seq_idx = torch.tensor([[5, 5, 5, 0, 0, 0, 0, 1, 1, -1, -1, -1], [2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2]])
    pieces = [[(0, 3), (3, 7), (7, 9)], [(0, 1), (1, 11), (11, 12)]]
    leaf = x.clone().requires_grad_()
    y = causal_conv1d_fn(leaf, weight, bias, seq_idx.int(), activation="silu")
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for row, spans in enumerate(pieces):
        for a, b in spans:
            expected[row : row + 1, :, a:b] = convolution(x[row : row + 1, :, a:b], weight, bias, "silu")
    assert error(y, expected) < 1e-6
    y.sum().backward()
    assert leaf.grad[0, :, 9:].abs().max() == 0


def test_a_state_larger_than_the_filter_and_several_tokens():
    x, weight, bias = inputs(length=11)
    for size in (3, 4, 7):
        state, reference = torch.zeros(2, 6, size), torch.zeros(2, 6, size)
        found = [
            causal_conv1d_update(x[..., 0], state, weight, bias, "silu")[..., None],
            causal_conv1d_update(x[..., 1:6], state, weight, bias, "silu"),
            causal_conv1d_update(x[..., 6:], state, weight, bias, "silu"),
        ]
        assert error(torch.cat(found, -1), convolution(x, weight, bias, "silu")) < 1e-6
        assert error(causal_conv1d_update_ref(x, reference, weight, bias, "silu"), torch.cat(found, -1)) < 1e-6
        assert torch.equal(state, reference)
        assert torch.equal(state, x[..., 11 - size :])


@pytest.mark.parametrize("size", [3, 5, 8])
def test_circular_buffer(size):
    """Rows of different ages; the place of the next token is the age modulo the buffer's size."""
    x, weight, bias = inputs(length=30)
    state, other = torch.zeros(2, 6, size), torch.zeros(2, 6, size)
    ages = torch.tensor([0, 3], dtype=torch.int32)
    outputs = []
    for start, end in [(0, 1), (1, 3), (3, 6), (6, 7)]:
        outputs.append(causal_conv1d_update(x[..., start:end], state, weight, bias, "silu", ages))
        expected = causal_conv1d_update_ref(x[..., start:end], other, weight, bias, "silu", ages)
        assert error(outputs[-1], expected) < 1e-6
        ages = ages + (end - start)
        assert torch.equal(state, other)
    assert error(torch.cat(outputs, -1), convolution(x[..., :7], weight, bias, "silu")) < 1e-6


def test_slots_and_padding_rows():
    x, weight, bias = inputs(b=3, length=1)
    pool = torch.randn(5, 6, 4)
    before = pool.clone()
    y = causal_conv1d_update(x[..., 0], pool, weight, bias, None, conv_state_indices=torch.tensor([4, -1, 2]).int())
    for row, slot in ((0, 4), (2, 2)):
        expected = convolution(x[row : row + 1], weight, bias, None, before[slot : slot + 1, :, 1:])
        assert error(y[row], expected[0, :, 0]) < 1e-6
        assert torch.equal(pool[slot], torch.cat([before[slot, :, 1:], x[row]], -1))
    assert y[1].abs().max() == 0
    for slot in (0, 1, 3):
        assert torch.equal(pool[slot], before[slot])


def test_gradients_flow_through_updates():
    x, weight, bias = inputs(length=6)
    mine, exact = leaves(x, weight, bias), leaves(*map(wide, (x, weight, bias)))
    state = torch.zeros(2, 6, 4)
    y = torch.stack([causal_conv1d_update(mine[0][..., t], state, *mine[1:], "silu") for t in range(6)], -1)
    expected, dy = convolution(*exact, "silu"), torch.randn(y.shape)
    for found, right in zip(gradients(y, mine, dy), gradients(expected, exact, dy), strict=True):
        assert error(found, right) < 4e-6


def test_states_of_a_packed_row():
    x = torch.randn(9, 6)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), 4)
    assert torch.equal(states[0], torch.cat([torch.zeros(2, 6), x[:2]]).T)
    assert states[1].abs().max() == 0
    assert torch.equal(states[2], x[5:9].T)


def test_what_does_not_fit_is_refused():
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match="activation 'gelu' is not known"):
        causal_conv1d_fn(x, weight, bias, activation="gelu")
    with pytest.raises(TypeError, match="pass activation= by name"):
        causal_conv1d_fn(x, weight, bias, "silu")
    with pytest.raises(ValueError, match="seq_idx packs whole sequences"):
        causal_conv1d_fn(x, weight, bias, torch.zeros(2, 17), torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 16\)"):
        causal_conv1d_fn(x, weight, bias, torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected .b, d, l."):
        causal_conv1d_fn(x[0], weight, bias)
    with pytest.raises(ValueError, match="s >= 3"):
        causal_conv1d_update(x[..., 0], torch.zeros(2, 6, 2), weight, bias)
