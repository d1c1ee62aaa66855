"""The fused mixer made of the convolution's and the scan's own kernels and matrix products, on every device.

No gradient is copied, added or cast between them: on a GPU the kernels write into the halves of one tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._products import product


def _split(selected: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """dt (b, l, r), B and C (b, l, n)."""
    r, n = dt_weight.shape[1], A.shape[1]
    return selected.split([r, n, n], -1)


def _normed(selected: Tensor, dt_weight: Tensor, norms: tuple[Tensor | None, ...], mixer_eps: float | None) -> Tensor:
    """x_proj's output as dt_proj and the scan read it."""
    if mixer_eps is None:
        return selected
    return torch.ops.mambakit.selection_norm(selected, *norms, dt_weight.shape[1], mixer_eps)


def _parameters(xz: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and the bias as the scan takes them."""
    wide = torch.float64 if xz.dtype == torch.float64 else torch.float32
    return -torch.exp(A_log.to(wide)), D.to(wide), dt_bias.to(wide)


def forward(
    xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, dt_norm, B_norm, C_norm, conv_state, ssm_state,
    cu_seqlens, recompute, interval, mixer_eps,
):  # fmt: skip
    """`mambakit::fused_mixer`."""
    before, z = xz.chunk(2, -1)
    x, conv_final = torch.ops.mambakit.causal_conv1d(before, conv_weight, conv_bias, "silu", conv_state, cu_seqlens)
    A, D, bias = _parameters(xz, A_log, D, dt_bias)
    selected = F.linear(x, x_weight.to(x.dtype))  # (b, l, r + 2 n)
    normed = _normed(selected, dt_weight, (dt_norm, B_norm, C_norm), mixer_eps)
    dt, B, C = _split(normed, dt_weight, A)
    delta = F.linear(dt, dt_weight.to(x.dtype))  # (b, l, d)
    y, ssm_final, checkpoints = torch.ops.mambakit.selective_scan(
        x, delta, A, B, C, D, z, bias, True, ssm_state, cu_seqlens, interval
    )
    if interval == 0:  # nothing is kept for a gradient
        return y, conv_final, ssm_final, x.new_empty(0), x.new_empty(0), x.new_empty(0), checkpoints
    if recompute:
        x, delta = x.new_empty(0), x.new_empty(0)
    return y, conv_final, ssm_final, x, delta, selected, checkpoints


@torch.no_grad()  # with create_graph=True, too: it writes into views
def backward(
    dy, dconv_final, dssm_final, xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, dt_norm, B_norm,
    C_norm, conv_state, ssm_state, cu_seqlens, x, delta, selected, checkpoints, interval, needs_x_weight,
    needs_dt_weight, mixer_eps,
):  # fmt: skip
    """`mambakit::fused_mixer_backward`."""
    before, z = xz.chunk(2, -1)
    A, D, bias = _parameters(xz, A_log, D, dt_bias)
    x_w, dt_w = x_weight.to(xz.dtype), dt_weight.to(xz.dtype)
    norms = dt_norm, B_norm, C_norm
    dt, B, C = _split(_normed(selected, dt_weight, norms, mixer_eps), dt_weight, A)
    conv = (conv_weight, conv_bias, "silu", conv_state, cu_seqlens)
    if x.numel() != before.numel():  # not kept
        x, _ = torch.ops.mambakit.causal_conv1d(before, *conv)
        delta = F.linear(dt, dt_w)
    if dy is None:
        dy = torch.zeros_like(x)
    dxz = xz.new_empty(xz.shape)
    dbefore, dz = dxz.chunk(2, -1)
    dx, ddelta, dA, dB, dC, dD, dbias, dssm_state = _scan_gradient(
        dz, dy, dssm_final, x, delta, A, B, C, D, z, bias, ssm_state, cu_seqlens, checkpoints, interval
    )  # fmt: skip
    dx_weight = ddt_weight = x_w.new_empty(0)
    steps = _rows(ddelta)
    if needs_dt_weight:
        ddt_weight = product(steps.T, _rows(dt), dt_weight.new_empty(dt_weight.shape))
    dselected = torch.cat([(steps @ dt_w).view(dt.shape), dB, dC], -1)
    dnorms = [xz.new_empty(0) for _ in norms]
    if mixer_eps is not None:
        dselected, *dnorms = torch.ops.mambakit.selection_norm_backward(
            dselected, selected, *norms, dt_weight.shape[1], mixer_eps
        )
        dnorms = [xz.new_empty(0) if w is None else g for g, w in zip(dnorms, norms, strict=True)]
    dselected = _rows(dselected)
    if needs_x_weight:
        dx_weight = product(dselected.T, _rows(x), x_weight.new_empty(x_weight.shape))
    dx.view(-1, dx.shape[2]).addmm_(dselected, x_w)  # in place: only this function uses the tensor
    dconv_weight, dconv_bias, dconv_state = _conv_gradient(dbefore, dx, dconv_final, before, *conv)
    return (
        dxz, dconv_weight, dconv_bias, dx_weight, ddt_weight, dA * A, dD, dbias, *dnorms, dconv_state, dssm_state,
    )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """(b, l, d) as (b l, d)."""
    return t.reshape(-1, t.shape[-1])


def _scan_gradient(
    dz, dy, dfinal, x, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, checkpoints, interval
) -> tuple[Tensor, ...]:
    """The gradients but for that of z, which is written into ``dz``."""
    arguments = (dy, dfinal, x, delta, A, B, C, D, z, bias, True, initial_state, cu_seqlens, checkpoints, interval)
    if dz.is_cuda:
        from mambakit.ops.selective_scan import cuda

        found = cuda.backward(*arguments, dz)
    else:
        found = torch.ops.mambakit.selective_scan_backward(*arguments)
        dz.copy_(found[6])
    return (*found[:6], *found[7:])


def _conv_gradient(dx, dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens) -> tuple[Tensor, ...]:
    """The gradients of weight, bias and state; that of the input is written into ``dx``."""
    arguments = (dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens)
    if dx.is_cuda:
        from mambakit.ops.causal_conv1d import triton

        found = triton.backward(*arguments, dx)
    else:
        found = torch.ops.mambakit.causal_conv1d_backward(*arguments)
        dx.copy_(found[0])
    return found[1:]
