"""`selective_scan_fn` of mamba_ssm: channels first, B and C in every form, complex A."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.compat.forms import alike, as_complex, grouped, parameter_dtype, require, require_tensors
from mambakit.ops import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The selective scan (arXiv 2312.00752, algorithm 2) in mamba_ssm's layout.

    Args:
        u, delta, z: (b, d, l), of any floating dtypes; the arithmetic is float32 (float64 in float64).
        A: (d, n), real, or complex for conjugate pairs of which one is stored: y is twice the real part.
        B, C: (d, n), constant over time; (b, n, l); or (b, g, n, l), a group for each d / g channels. With a complex A
            the last two end in 2 l, real and imaginary parts in turn.
        D, delta_bias: (d,).
        return_last_state: also return h_l, (b, d, n) float32 or complex64. Gradients flow through it, which they do
            not upstream.

    Returns:
        (b, d, l) in u's dtype.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a second derivative.
    """
    y, state = channels_first_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def channels_first_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_fn`'s output and last state."""
    op = "selective_scan_fn"
    require_tensors(op, u=u, delta=delta, A=A, B=B, C=C)
    require(u.dim() == 3, f"{op}: u has shape {tuple(u.shape)}, expected (b, d, l)")
    require(A.dim() == 2, f"{op}: A has shape {tuple(A.shape)}, expected (d, n)")
    (b, d, length), n = u.shape, A.shape[1]
    require(A.shape[0] == d, f"{op}: A has shape {tuple(A.shape)}, expected (d, n) with the d = {d} of u")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            require(
                tensor.shape == u.shape,
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected (b, d, l) = {tuple(u.shape)}",
            )
    if A.is_complex():
        B, C = as_complex(B), as_complex(C)
    B, C = alike(grouped(op, "B", B, b, d, n, length), grouped(op, "C", C, b, d, n, length))
    z = None if z is None else z.transpose(1, 2)
    y, state = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return y.transpose(1, 2).contiguous(), state  # callers view (b, d, l) in other shapes


class SelectiveScanFn:
    """mamba_ssm's autograd function, of which callers use ``apply``."""

    apply = staticmethod(selective_scan_fn)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan_fn` as a loop over time in plain PyTorch: slow, differentiable any number of times."""
    (b, d, length), n, dtype = u.shape, A.shape[1], parameter_dtype(u.dtype)
    if A.is_complex():
        B, C = as_complex(B), as_complex(C)
    wide = torch.promote_types(dtype, A.dtype)
    A = A.to(wide)
    B, C = (_each_channel(grouped("selective_scan_ref", "B or C", t, b, d, n, length), length, d) for t in (B, C))
    by_time = [t.to(wide) for t in (B, C)]
    steps = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    state = torch.zeros((b, d, n), dtype=wide, device=u.device)
    outputs = []
    for t in range(length):
        step = steps[:, :, t, None]  # (b, d, 1)
        state = torch.exp(step * A) * state + step * by_time[0][:, t] * u[:, :, t, None].to(dtype)
        y = (state * by_time[1][:, t]).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(outputs, 2) if outputs else torch.zeros_like(u, dtype=dtype)
    if D is not None:
        out = out + u.to(dtype) * D.to(dtype)[:, None]
    if z is not None:
        out = out * F.silu(z.to(dtype))
    out = out.to(u.dtype)
    return (out, state) if return_last_state else out


def _each_channel(value: Tensor, length: int, d: int) -> Tensor:
    """(b, l, n), (b, l, g, n) or (1, 1, d, n) as (b or 1, l, d or 1, n)."""
    value = value[:, :, None] if value.dim() == 3 else value.repeat_interleave(d // value.shape[2], 2)
    return value.expand(-1, length, -1, -1)
