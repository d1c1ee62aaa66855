"""selective_state_update, step after step, is the scan; heads, groups, slots, halves, gradients."""

from __future__ import annotations

import pytest
import torch

from mambakit.compat.state_update import selective_state_update, selective_state_update_ref
from tests.compat.oracles import error, gradients, leaves, scan, wide


def inputs(b=2, d=6, n=5, length=7, dtype=torch.float32):
    """x, dt, z (b, d, l); A, D, dt_bias; B, C (b, n, l)."""
    x, dt, z = (torch.randn(b, d, length).to(dtype) for _ in range(3))
    B, C = (torch.randn(b, n, length).to(dtype) for _ in range(2))
    return x, dt, z, -torch.rand(d, n), torch.randn(d), torch.randn(d) - 2, B, C


@pytest.mark.parametrize("update", [selective_state_update, selective_state_update_ref])
@pytest.mark.parametrize(
    ("dtype", "kept", "tolerance"),
    [(torch.float32, torch.float32, 2e-6), (torch.float64, torch.float64, 1e-13), (torch.bfloat16, torch.float32, 8e-3),
     (torch.bfloat16, torch.bfloat16, 2e-2), (torch.float16, torch.float32, 1e-3)],
)  # fmt: skip
def test_steps_are_the_scan(update, dtype, kept, tolerance):
    x, dt, z, A, D, bias, B, C = inputs(dtype=dtype)
    A, D, bias = (t.to(torch.promote_types(dtype, torch.float32)) for t in (A, D, bias))
    state = torch.zeros(2, 6, 5, dtype=kept)
    found = [update(state, x[..., t], dt[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True) for t in range(7)]
    expected, last = scan(x, dt, A, B, C, D, z, bias, True)
    assert error(torch.stack(found, -1), expected) < tolerance
    assert error(state, last) < tolerance


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_and_groups(groups):
    """Mamba-2's form: A the same for a head, groups of heads that share B and C."""
    b, heads, p, n = 3, 4, 5, 6
    state = torch.randn(b, heads, p, n)
    x, dt, z = (torch.randn(b, heads, p) for _ in range(3))
    A = -torch.rand(heads)[:, None, None].expand(heads, p, n)
    D, bias = (torch.randn(heads)[:, None].expand(heads, p) for _ in range(2))
    B, C = (torch.randn(b, groups, n) for _ in range(2))
    mine, other = state.clone(), state.clone()
    y = selective_state_update(mine, x, dt, A, B, C, D, z, bias, True)
    expected = selective_state_update_ref(other.double(), *(t.double() for t in (x, dt, A, B, C, D, z, bias)), True)
    step = torch.log1p(torch.exp(dt + bias))
    per_head = B.repeat_interleave(heads // groups, 1)
    after = state * torch.exp(step[..., None] * A) + step[..., None] * per_head[:, :, None] * x[..., None]
    assert error(y, expected) < 2e-6
    assert error(mine, after) < 2e-6


def test_a_state_whose_channels_do_not_lie_side_by_side():
    b, heads, p, n = 2, 3, 4, 5
    state = torch.randn(b, p, heads, n).transpose(1, 2)
    before = state.clone()
    x, dt = torch.randn(b, heads, p), torch.randn(b, heads, p)
    A, B, C = -torch.rand(heads, p, n), torch.randn(b, 1, n), torch.randn(b, 1, n)
    y = selective_state_update(state, x, dt, A, B, C, dt_softplus=True)
    expected = selective_state_update_ref(before, x, dt, A, B, C, dt_softplus=True)
    assert error(y, expected) < 2e-6
    assert error(state, before) < 2e-6


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_slots_and_padding_rows(kept):
    x, dt, z, A, D, bias, B, C = (t[..., 0] if t.dim() == 3 else t for t in inputs(b=3))
    pool = torch.randn(5, 6, 5).to(kept)
    before = pool.clone()
    y = selective_state_update(
        pool, x, dt, A, B, C, D, z, bias, True, state_batch_indices=torch.tensor([3, -1, 0], dtype=torch.int32)
    )
    for row, slot in ((0, 3), (2, 0)):
        state = before[slot : slot + 1].clone()
        one = [t[row : row + 1] for t in (x, dt)], [t[row : row + 1] for t in (B, C)]
        expected = selective_state_update(state, *one[0], A, *one[1], D, z[row : row + 1], bias, True)
        assert error(y[row : row + 1], expected) < 1e-6
        assert torch.equal(pool[slot], state[0])
    assert y[1].abs().max() == 0
    for slot in (1, 2, 4):
        assert torch.equal(pool[slot], before[slot])


def test_gradients_flow_through_steps():
    x, dt, z, A, D, bias, B, C = inputs()
    mine = leaves(x, dt, A, B, C, D, z, bias)
    exact = leaves(*map(wide, mine))
    state = torch.zeros(2, 6, 5)
    x, dt, A, B, C, D, z, bias = mine
    y = torch.stack([
        selective_state_update(state, x[..., t], dt[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True)
        for t in range(7)
    ], -1)  # fmt: skip
    expected, _ = scan(*exact, True)
    dy = torch.randn(y.shape)
    for found, right in zip(gradients(y, mine, dy), gradients(expected, exact, dy), strict=True):
        assert error(found, right) < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("dt", torch.zeros(2, 5), "dt has shape"), ("B", torch.zeros(2, 4), "B has shape"),
     ("A", torch.zeros(6, 4), "A has shape"), ("state", torch.zeros(2, 6), "state has shape"),
     ("B", torch.zeros(2, 3, 5), "B has 3 groups, which do not divide the 1 heads")],
)  # fmt: skip
def test_wrong_shapes_are_named(name, value, message):
    arguments = {"state": torch.zeros(2, 6, 5), "x": torch.zeros(2, 6), "dt": torch.zeros(2, 6)}
    arguments |= {"A": torch.zeros(6, 5), "B": torch.zeros(2, 5), "C": torch.zeros(2, 5), name: value}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**arguments)


@pytest.mark.parametrize("layout", ["dense", "heads apart", "one head", "one channel", "rows apart", "states apart"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_anywhere_in_memory(layout, compiled):
    """It is updated in place, and torch.compile takes the call whole."""
    b, heads, p, n = 2, {"one head": 1}.get(layout, 3), {"one channel": 1}.get(layout, 4), 5
    state = {
        "heads apart": torch.randn(b, heads, 2 * p, n)[:, :, :p], "rows apart": torch.randn(b, 2 * heads, p, n)[:, ::2],
        "states apart": torch.randn(b, heads, p, 2 * n)[..., ::2],
    }.get(layout, torch.randn(b, heads, p, n))  # fmt: skip
    before = state.clone()
    x, dt = torch.randn(b, heads, p), torch.randn(b, heads, p)
    operands = (x, dt, -torch.rand(heads, p, n), torch.randn(b, 1, n), torch.randn(b, 1, n))

    def step(state):
        return selective_state_update(state, *operands, dt_softplus=True)

    with torch.no_grad():
        found = (torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step)(state)
        expected = selective_state_update_ref(before, *operands, dt_softplus=True)
    assert error(found, expected) < 2e-6
    assert error(state, before) < 2e-6
