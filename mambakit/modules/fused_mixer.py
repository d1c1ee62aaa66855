"""A layer's training pass with gradients of its own, so that nothing is copied, added or cast between its ops.

Left to autograd, the gradients of x and z would be concatenated, the two that the convolution's output has would be added, and those
of float32 weights under autocast rounded to half before they are widened. Here the ops write into the halves of one tensor, the
product of x_proj's gradient is added inside cuBLAS, and weights' gradients are written in the weights' dtype. The arithmetic is
otherwise that of `MambaMixer._mix`, which serves where a projection is wrapped, hooked or quantised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.modules.interception import untouched
from mambakit.ops._autocast import autocast_dtype
from mambakit.ops._backends.memory import all_plain, transformed
from mambakit.ops._once import differentiated_once
from mambakit.ops._products import product
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL


def in_training() -> bool:
    """Whether gradients are wanted, by plain autograd."""
    return torch.is_grad_enabled() and not transformed()


def project(module: Any, x: Tensor) -> Tensor:
    """``module(x)`` of a linear layer; where autocast runs a float32 weight in half, its gradient is never rounded to half."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and in_training() and untouched(module, nn.Linear):
        weight, bias = module.weight, module.bias
        fits = weight.dtype == torch.float32 and dtype.itemsize == 2 and x.dtype in (dtype, torch.float32)
        if fits and all_plain((x, weight, bias)):
            return _Projection.apply(x.to(dtype), weight, bias)
    return module(x)


class _Projection(torch.autograd.Function):
    """x W^T + bias in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w, weight, bias)
        ctx.dtype = weight.dtype
        return F.linear(x, w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, w, weight, bias = ctx.saved_tensors
        with torch.no_grad():
            gradients = _Projection._gradients(ctx, dy, x, w)
        return differentiated_once("linear", gradients, (dy, x, weight, bias))

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ w).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = product(
                rows.T, x.reshape(-1, x.shape[-1]), torch.empty(w.shape, dtype=ctx.dtype, device=w.device)
            )
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0, dtype=ctx.dtype)
        return dx, dweight, dbias


class Weights(NamedTuple):
    """What lies between a layer's projections: (d, k), (d,), (r + 2 n, d), (d, r), (d, n), (d,), (d,)."""

    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor


def mix(
    xz: Tensor, weights: Weights, conv_state: Tensor | None = None, ssm_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolution with SiLU, selection and scan (arXiv 2312.00752, algorithm 2).

    Args:
        xz: (b, l, 2 d), in_proj's output.
        conv_state, ssm_state: (b, d, k - 1) and (b, d, n), before the first token; zeros when absent. (s, ...) when packed.
        cu_seqlens: (s + 1,) int32 of a packed row.
        recompute: do not keep the convolution's output and delta, (b, l, d) each, for the backward pass, but compute them again.

    Returns:
        (b, l, d) in the dtype of ``xz``, and both states after the last token. Differentiable in and through all of them.
    """
    return _Mix.apply(xz, *weights, conv_state, ssm_state, cu_seqlens, recompute)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, conv_state, ssm_state, cu_seqlens,
        recompute,
    ):  # fmt: skip
        wide = torch.float64 if xz.dtype == torch.float64 else torch.float32
        before, z = xz.chunk(2, -1)
        conv = (conv_weight, conv_bias, "silu", conv_state, cu_seqlens)
        x, conv_final = torch.ops.mambakit.causal_conv1d(before, *conv)
        x_w, dt_w = x_weight.to(x.dtype), dt_weight.to(x.dtype)
        r, n = dt_weight.shape[1], A_log.shape[1]
        selected = F.linear(x, x_w)
        dt, B, C = selected.split([r, n, n], -1)
        delta = F.linear(dt, dt_w)
        D_given = D
        A, D, bias = -torch.exp(A_log.to(wide)), D.to(wide), dt_bias.to(wide)
        interval = CHECKPOINT_INTERVAL if any(ctx.needs_input_grad) else 0
        y, ssm_final, checkpoints = torch.ops.mambakit.selective_scan(
            x, delta, A, B, C, D, z, bias, True, ssm_state, cu_seqlens, interval
        )
        kept = (None, None) if recompute else (x, delta)
        ctx.save_for_backward(
            xz, *kept, selected, checkpoints, conv_weight, conv_bias, x_w, dt_w, A, D, bias, conv_state, ssm_state, cu_seqlens,
            x_weight, dt_weight, A_log, D_given, dt_bias,
        )  # fmt: skip
        ctx.weight_dtypes = x_weight.dtype, dt_weight.dtype
        ctx.set_materialize_grads(False)
        return y, conv_final, ssm_final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        *saved, x_weight, dt_weight, A_log, D, dt_bias = ctx.saved_tensors
        xz, conv_weight, conv_bias, conv_state, ssm_state = (saved[i] for i in (0, 5, 6, 12, 13))
        with torch.no_grad():
            found = _Mix._gradients(ctx, gradients, saved)
        origins = (xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, conv_state, ssm_state)
        return differentiated_once("selective_scan", found, (*gradients, *origins))

    @staticmethod
    def _gradients(ctx: Any, gradients: tuple[Tensor | None, ...], saved: list[Any]) -> tuple[Tensor | None, ...]:
        dy, dconv_final, dssm_final = gradients
        (
            xz,
            x,
            delta,
            selected,
            checkpoints,
            conv_weight,
            conv_bias,
            x_w,
            dt_w,
            A,
            D,
            bias,
            conv_state,
            ssm_state,
            cu_seqlens,
        ) = saved
        r, n = dt_w.shape[1], A.shape[1]
        before, z = xz.chunk(2, -1)
        dt, B, C = selected.split([r, n, n], -1)
        conv = (conv_weight, conv_bias, "silu", conv_state, cu_seqlens)
        if x is None:
            x, _ = torch.ops.mambakit.causal_conv1d(before, *conv)
            delta = F.linear(dt, dt_w)
        if dy is None:
            dy = torch.zeros_like(x)
        # vmap (is_grads_batched, a vectorised Jacobian) has batched some of these, and writes into no memory that is not.
        batched = not all_plain(gradients)
        dxz = None if batched else torch.empty_like(xz)
        dbefore, dz = (None, None) if dxz is None else dxz.chunk(2, -1)
        dx, ddelta, dA, dB, dC, dD, dz, dbias, dssm_state = _scan_gradient(
            dz, dy, dssm_final, x, delta, A, B, C, D, z, bias, ssm_state, cu_seqlens, checkpoints
        )  # fmt: skip
        x_dtype, dt_dtype = ctx.weight_dtypes
        dx_weight = ddt_weight = None
        steps = _rows(ddelta)
        if ctx.needs_input_grad[4]:
            ddt_weight = product(steps.T, _rows(dt), dt_w.new_empty(dt_w.shape, dtype=dt_dtype))
        dselected = _rows(torch.cat([(steps @ dt_w).view(dt.shape), dB, dC], -1))
        if ctx.needs_input_grad[3]:
            dx_weight = product(dselected.T, _rows(x), x_w.new_empty(x_w.shape, dtype=x_dtype))
        if batched:
            dx = dx + (dselected @ x_w).view(dx.shape)
        else:
            dx.view(-1, dx.shape[2]).addmm_(dselected, x_w)  # the op's own memory: nobody else sees it
        dbefore, dconv_weight, dconv_bias, dconv_state = _conv_gradient(dbefore, dx, dconv_final, before, *conv)
        if dxz is None:
            dxz = torch.cat([dbefore, dz], -1)
        return (
            dxz, dconv_weight, None if conv_bias is None else dconv_bias, dx_weight, ddt_weight, dA * A, dD, dbias,
            None if conv_state is None else dconv_state, None if ssm_state is None else dssm_state, None, None,
        )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """(b, l, d) as (b l, d)."""
    return t.reshape(-1, t.shape[-1])  # not flatten, which vmap has no rule for


def _scan_gradient(
    dz, dy, dfinal, x, delta, A, B, C, D, z, bias, initial, cu_seqlens, checkpoints
) -> tuple[Tensor, ...]:
    """The gradients; those of z go into ``dz`` where it is memory."""
    arguments = (dy, dfinal, x, delta, A, B, C, D, z, bias, True, initial, cu_seqlens, checkpoints, CHECKPOINT_INTERVAL)
    if dz is not None and dy.is_cuda:
        from mambakit.ops.selective_scan import cuda

        found = cuda.backward(*arguments, dz)
    else:
        found = torch.ops.mambakit.selective_scan_backward(*arguments)
        dz = found[6] if dz is None else dz.copy_(found[6])
    return (*found[:6], dz, *found[7:])


def _conv_gradient(dx, dy, dfinal, x, weight, bias, activation, state, cu_seqlens) -> tuple[Tensor, ...]:
    """Those of x, weight, bias and state; that of x goes into ``dx`` where it is memory."""
    arguments = (dy, dfinal, x, weight, bias, activation, state, cu_seqlens)
    if dx is not None and dy.is_cuda:
        from mambakit.ops.causal_conv1d import triton

        _, dweight, dbias, dstate = triton.backward(*arguments, dx)
    else:
        found, dweight, dbias, dstate = torch.ops.mambakit.causal_conv1d_backward(*arguments)
        dx = found if dx is None else dx.copy_(found)
    return dx, dweight, dbias, dstate
