"""The compiled scans that callers use directly: mamba_ssm's ``selective_scan_cuda``, VMamba's ``_oflex`` and ``_core``.

An extension knows no autograd: each call returns tensors. A backward call computes the forward again, from its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.compat.forms import parameter_dtype, require
from mambakit.compat.selective_scan import channels_first_scan

_CHUNK = 2048  # tokens of a chunk, of which mamba_ssm returns the states


@torch.no_grad()
def scan_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """``selective_scan_cuda.fwd``, 9 arguments.

    Returns:
        [out (b, d, l), x], and with ``z`` a third, out * silu(z). ``x`` is (b, d, chunks, 2 n); of it callers read the
        last state, ``x[:, :, -1, 1::2]``. The rest of it, which upstream's own backward pass reads, is NaN.
    """
    out, state = channels_first_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    found = [out, _chunk_states(state, u.shape[2])]
    if z is not None:
        wide = parameter_dtype(out.dtype)
        found.append((out.to(wide) * torch.nn.functional.silu(z.to(wide))).to(out.dtype))
    return found


def _chunk_states(state: Tensor, length: int) -> Tensor:
    b, d, n = state.shape
    chunks = max(-(-length // _CHUNK), 1)
    x = torch.full((b, d, chunks, 2 * n), float("nan"), dtype=state.dtype, device=state.device)
    x[:, :, -1, 1::2] = state
    return x


def scan_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, out: Tensor | None, dz: Tensor | None,
    delta_softplus: bool, recompute_out_z: bool,
) -> list[Tensor | None]:  # fmt: skip
    """``selective_scan_cuda.bwd``, 14 arguments; ``x`` and ``out`` are not read.

    Args:
        dz: where z's gradient is written, or None.

    Returns:
        [du, ddelta, dA, dB, dC, dD, ddelta_bias], with ``z`` dz, and with ``recompute_out_z`` out * silu(z). Gradients
        of absent arguments are None.
    """
    leaves = _leaves(u, delta, A, B, C, D, delta_bias, z)
    with torch.enable_grad():
        u, delta, A, B, C, D, delta_bias, z = leaves
        y, _ = channels_first_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        gradients = _gradients(y, leaves, dout)
    found = gradients[:7]
    if z is not None:
        found.append(gradients[7] if dz is None else dz.copy_(gradients[7]))
    if recompute_out_z:
        require(z is not None, "selective_scan_cuda.bwd: recompute_out_z has no effect without z; pass z, or False")
        found.append(y.detach())
    return found


def _leaves(*inputs: Any) -> Any:
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


def _gradients(y: Tensor, leaves: list[Any], dy: Tensor) -> list[Any]:
    """One gradient for each leaf, None for None, in its dtype."""
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, given, dy.to(y.dtype)))
    return [None if t is None else next(found) for t in leaves]


@torch.no_grad()
def oflex_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, nrows: int, out_float: bool,
) -> list[Tensor]:  # fmt: skip
    """``selective_scan_cuda_oflex.fwd``, 10 arguments: no z, ``out_float`` for a float32 output.

    ``delta`` (b, d / q, l) and ``delta_bias`` (d / q,) may have fewer channels than ``u``. ``nrows`` is a layout of
    VMamba's kernel, without effect on the result.
    """
    delta, delta_bias = _for_each_channel(u, delta, delta_bias)
    inputs = u.float() if out_float else u
    out, state = channels_first_scan(inputs, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return [out, _chunk_states(state, u.shape[2])]


def oflex_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dout: Tensor, x: Tensor | None, delta_softplus: bool, nrows: int,
) -> list[Tensor | None]:  # fmt: skip
    """``selective_scan_cuda_oflex.bwd`` and ``selective_scan_cuda_core.bwd``, 11 arguments; ``x`` is not read."""
    leaves = _leaves(u, delta, A, B, C, D, delta_bias)
    with torch.enable_grad():
        u, delta, A, B, C, D, delta_bias = leaves
        delta, delta_bias = _for_each_channel(u, delta, delta_bias)
        u = u.to(torch.promote_types(u.dtype, dout.dtype))
        y, _ = channels_first_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        return _gradients(y, leaves, dout)


def _for_each_channel(u: Tensor, delta: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The time steps, repeated for the channels that share them."""
    d, steps = u.shape[1], delta.shape[1]
    require(
        steps >= 1 and d % steps == 0,
        f"selective_scan_cuda_oflex: the {steps} channels of delta do not divide the {d} of u",
    )
    if steps == d:
        return delta, delta_bias
    bias = None if delta_bias is None else delta_bias.repeat_interleave(d // steps)
    return delta.repeat_interleave(d // steps, 1), bias


@torch.no_grad()
def core_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, nrows: int,
) -> list[Tensor]:  # fmt: skip
    """``selective_scan_cuda_core.fwd``, 9 arguments; ``nrows`` as in `oflex_fwd`."""
    out, state = channels_first_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return [out, _chunk_states(state, u.shape[2])]
