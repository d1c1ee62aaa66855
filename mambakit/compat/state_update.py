"""`selective_state_update` of mamba_ssm: one token of the scan, with heads, groups and slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.compat.forms import require, require_integers, require_tensors
from mambakit.ops import selective_scan, selective_scan_
from mambakit.ops.selective_scan.schema import state_dtype


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence; ``state`` is updated in place.

    Args:
        state: (b, d, n) or (b, heads, p, n), or (slots, ...) with ``state_batch_indices``.
        x, dt, z: (b, d) or (b, heads, p). A: (d, n) or (heads, p, n).
        B, C: (b, n) or (b, g, n), a group for each heads / g heads.
        D, dt_bias: (d,) or (heads, p).
        state_batch_indices: (b,) integers, the slot of each row; the output of a negative slot is 0.

    Returns:
        Of x's shape and dtype. Where gradients are recorded they flow through the states, too.
    """
    op = "selective_state_update"
    require_tensors(op, state=state, x=x, dt=dt, A=A, B=B, C=C)
    require(
        state.dim() in (3, 4) and x.dim() == state.dim() - 1,
        f"{op}: state has shape {tuple(state.shape)} and x {tuple(x.shape)}; expected (b, d, n) and (b, d), or "
        "(b, heads, p, n) and (b, heads, p)",
    )
    b, n, d = x.shape[0], state.shape[-1], x[0].numel() if x.shape[0] else 0
    require(tuple(state.shape[1:-1]) == tuple(x.shape[1:]), f"{op}: state {tuple(state.shape)}, x {tuple(x.shape)}")
    if state_batch_indices is not None:
        require_integers(op, "state_batch_indices", state_batch_indices, "(b,)", (b,))
    else:
        require(
            state.shape[0] == b,
            f"{op}: state has {state.shape[0]} rows, x {b}; name the rows' slots with state_batch_indices",
        )
    heads = x.shape[1] if x.dim() == 3 else 1
    shapes = {"dt": (dt, x.shape), "z": (z, x.shape), "A": (A, state.shape[1:])}
    shapes |= {"D": (D, x.shape[1:]), "dt_bias": (dt_bias, x.shape[1:])}
    for name, (tensor, expected) in shapes.items():
        require(
            tensor is None or tuple(tensor.shape) == tuple(expected),
            f"{op}: {name} has shape {None if tensor is None else tuple(tensor.shape)}, expected {tuple(expected)}",
        )
    for name, tensor in (("B", B), ("C", C)):
        require(
            tensor.dim() in (2, 3) and tensor.shape[0] == b and tensor.shape[-1] == n,
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected (b, n) or (b, g, n) with b = {b}, n = {n}",
        )
        require(
            tensor.dim() == 2 or heads % tensor.shape[1] == 0,
            f"{op}: {name} has {tensor.shape[-2]} groups, which do not divide the {heads} heads",
        )
    if b == 0:
        return torch.empty_like(x)
    u, delta, gate = (None if t is None else t.reshape(b, 1, d) for t in (x, dt, z))
    assert u is not None
    assert delta is not None
    A, D, dt_bias = A.reshape(d, n), *(None if t is None else t.reshape(d) for t in (D, dt_bias))
    B, C = (t[:, None, 0] if t.dim() == 3 and t.shape[1] == 1 else t[:, None] for t in (B, C))  # (b, 1, [g,] n)
    pool = state.reshape(state.shape[0], d, n)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (pool, u, delta, A, B, C, D, gate, dt_bias)
    )
    wide = state_dtype(u, delta, B, C, gate)
    operands: Any = (u, delta, A, B, C, D, gate, dt_bias, dt_softplus)
    if state_batch_indices is not None:
        rows = state_batch_indices.long()
        y, after = selective_scan(*operands, initial_state=pool[rows.clamp(min=0)])
        kept = rows >= 0
        pool[rows[kept]] = after[kept].to(pool.dtype)
        y = y.masked_fill(~kept[:, None, None], 0)
    elif recorded or pool.dtype != wide:
        y, after = selective_scan(*operands, initial_state=pool[:b].clone())  # the pool is written below
        pool[:b] = after.to(pool.dtype)
    else:
        y, _ = selective_scan_(*operands, state=pool[:b])
    if not _is_view(state):
        state.copy_(pool.view(state.shape))
    return y.reshape(x.shape)


def _is_view(state: Tensor) -> bool:
    """Whether heads and channels lie side by side, so that they are one dimension without a copy."""
    if state.dim() == 3 or 1 in state.shape[1:3]:
        return True
    return state.stride(1) == state.shape[2] * state.stride(2)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain PyTorch; arguments as there."""
    dtype = state_dtype(x, dt, B, C, z)
    heads = x.shape[1] if x.dim() == 3 else 1

    def by_head(t: Tensor) -> Tensor:  # (b, n) or (b, g, n) as (b, [heads, 1,] n)
        t = t.to(dtype)
        if x.dim() == 2:
            return (t[:, 0] if t.dim() == 3 else t)[:, None]
        t = t[:, None] if t.dim() == 2 else t
        return t.repeat_interleave(heads // t.shape[1], 1)[:, :, None]

    steps = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    steps = torch.nn.functional.softplus(steps) if dt_softplus else steps
    wide = x.to(dtype)
    after = state.to(dtype) * torch.exp(steps[..., None] * A.to(dtype)) + (steps * wide)[..., None] * by_head(B)
    state.copy_(after)
    y = (after * by_head(C)).sum(-1)
    if D is not None:
        y = y + wide * D.to(dtype)
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype))
    return y.to(x.dtype)
