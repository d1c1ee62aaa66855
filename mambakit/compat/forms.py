"""The forms in which mamba_ssm's interface passes a scan's operands, brought to `mambakit.ops.selective_scan`'s.

mamba_ssm is channels first, ``(b, d, l)``; the views made here are channels last, without a copy.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambakit.ops import selective_scan


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which operands of several dtypes meet: the widest of theirs."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of A, D and delta_bias, and of states, for operands of ``dtype``: float32, or float64 in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def grouped(op: str, name: str, value: Tensor, b: int, d: int, n: int, length: int) -> Tensor:
    """B or C as (b, l, n), or (b, l, g, n) where groups of channels have their own.

    Args:
        value: (d, n), constant over time; (b, n, l); or (b, g, n, l). For a complex A the real and imaginary parts
            alternate along the last dimension of the latter two, which is 2 l.
    """
    if value.dim() == 2:
        require(tuple(value.shape) == (d, n), f"{op}: {name} has shape {tuple(value.shape)}, expected {(d, n)}, (d, n)")
        return value[None, None].expand(b, length, d, n)
    require(
        value.dim() in (3, 4) and value.shape[0] == b and tuple(value.shape[-2:]) == (n, length),
        f"{op}: {name} has shape {tuple(value.shape)}, expected (d, n), (b, n, l) or (b, g, n, l) with b = {b}, "
        f"d = {d}, n = {n}, l = {length}",
    )
    if value.dim() == 3:
        return value.transpose(1, 2)
    require(
        value.shape[1] >= 1 and d % value.shape[1] == 0,
        f"{op}: {name} has {value.shape[1]} groups, which do not divide the {d} channels",
    )
    return value[:, 0].transpose(1, 2) if value.shape[1] == 1 else value.permute(0, 3, 1, 2)


def as_complex(value: Tensor) -> Tensor:
    """(b, n, 2 l) or (b, g, n, 2 l) of alternating real and imaginary parts as complex numbers."""
    if value.dim() == 2 or value.is_complex():
        return value
    require(value.shape[-1] % 2 == 0, f"a complex B or C of last dimension {value.shape[-1]}, expected 2 l")
    wide = value.to(parameter_dtype(value.dtype))
    return torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan over channels-last operands of any dtypes: casts, and a complex A as a real one.

    Args:
        u, delta, z: (b, l, d).
        A: (d, n), real or complex.
        B, C: (b, l, n) or (b, l, g, n), complex where A is.
        initial_state: (b, d, n), with a real A.

    Returns:
        y (b, l, d) in u's dtype, and the last state (b, d, n), float32 or complex64 (float64, complex128).
    """
    if A.is_complex():
        require(initial_state is None, "a scan with a complex A starts from zero; pass a real A, or no state")
        return _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dtype = wide_dtype(u, delta, B, C, z)
    wide = parameter_dtype(dtype)
    z, D, delta_bias, initial_state = (
        None if t is None else t.to(to) for t, to in ((z, dtype), (D, wide), (delta_bias, wide), (initial_state, wide))
    )
    y, state = _op(
        u.to(dtype), delta.to(dtype), A.to(wide), B.to(dtype), C.to(dtype), D, z, delta_bias, delta_softplus,
        initial_state,
    )  # fmt: skip
    return y.to(u.dtype), state


def _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """A complex A as a real scan over twice the states (S4D's complex diagonal, arXiv 2206.11893).

    With a_t = exp(delta_t A) and the angle w_t = Im A * (delta_1 + ... + delta_t), g_t = exp(-i w_t) h_t follows
    g_t = |a_t| g_{t-1} + delta_t exp(-i w_t) B_t u_t, whose real and imaginary parts are two real scans, and
    y_t = 2 Re(C_t exp(i w_t) g_t). B and C then differ by channel, (b, l, d, n).
    """
    b, length, d = u.shape
    n = A.shape[1]
    dtype = parameter_dtype(wide_dtype(u, delta))
    steps = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    if delta_softplus:
        steps = torch.nn.functional.softplus(steps)
    # In float64: an angle of float32 would lose what its whole turns take of the mantissa.
    angle = torch.remainder(steps.double().cumsum(1)[..., None] * A.imag.double(), 2 * torch.pi).to(dtype)
    turn = torch.polar(torch.ones_like(angle), angle)  # (b, l, d, n)
    B, C = _by_channel(B, d) * turn.conj(), _by_channel(C, d) * turn * 2
    y, state = scan(
        u.to(dtype), steps, torch.cat([A.real, A.real], 1), torch.cat([B.real, B.imag], -1),
        torch.cat([C.real, -C.imag], -1), D, z, None, False,
    )  # fmt: skip
    last = turn[:, -1] if length else torch.ones((b, d, n), dtype=turn.dtype, device=u.device)
    return y.to(u.dtype), torch.complex(state[..., :n], state[..., n:]) * last


def _by_channel(value: Tensor, d: int) -> Tensor:
    """(b, l, n) or (b, l, g, n) as (b, l, d, n)."""
    value = value[:, :, None] if value.dim() == 3 else value
    b, length, groups, n = value.shape
    return value[:, :, :, None].expand(b, length, groups, d // groups, n).flatten(2, 3)


def _op(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state) -> tuple[Tensor, Tensor]:
    """`selective_scan`, with groups as scans of their own."""
    d = u.shape[2]
    groups = max(t.shape[2] if t.dim() == 4 else 1 for t in (B, C))
    size = d // groups
    found = []
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)

        def part(t: Tensor | None, dim: int, rows: slice = rows) -> Tensor | None:
            return None if t is None else t[(slice(None),) * dim + (rows,)]

        def of_group(t: Tensor, g: int = g) -> Tensor:
            return t if t.dim() == 3 else t[:, :, g * t.shape[2] // groups]

        operands = (u[..., rows], delta[..., rows], A[rows], of_group(B), of_group(C), part(D, 0), part(z, 2))
        state = part(initial_state, 1)
        found.append(selective_scan(*operands, part(delta_bias, 0), delta_softplus, initial_state=state))
    if groups == 1:
        return found[0]
    return torch.cat([y for y, _ in found], 2), torch.cat([state for _, state in found], 1)
