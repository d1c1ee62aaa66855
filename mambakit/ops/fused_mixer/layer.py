"""A whole Mamba layer, its norm included, as one autograd function over a `Plan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._autocast import autocast_dtype
from mambakit.ops._backends.memory import is_plain, observed, transformed
from mambakit.ops._once import differentiated_once
from mambakit.ops.fused_mixer.plan import Plan
from mambakit.ops.fused_mixer.signature import ALIGNED, LayerWeights, Signature, unserved

# Plans, and None for signatures that none serves.
_plans: dict[Signature, Plan | None] = {}


def on_gpu(x: Tensor) -> bool:
    """Whether x is where layers run as plans."""
    return x.is_cuda


def fused_layer(
    x: Tensor, residual: Tensor | None, weights: LayerWeights, eps: float = 0.0, kept: torch.dtype | None = None,
    states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """A layer on whole rows, on an NVIDIA GPU, without torch's dispatcher between its parts.

    Args:
        x: (b, l, h).
        residual: (b, l, h), added to x before the norm, or None.
        weights: without a norm, x enters the mixer as it is.
        eps: the norm's.
        kept: the dtype of the residual stream that is returned; that of x when absent.
        states: (slots, d, k - 1) and (slots, d, n) float32, from which the first b rows continue and which are updated
            in place, without gradients. Rows begin from zeros when absent.

    Returns:
        (b, l, h) in the dtype that linear layers compute in, and the residual stream (b, l, h), None without a norm.
        Differentiable once in x, residual and weights. None where no plan serves the call: another device, tensors
        that are no plain contiguous memory, a call that is traced or observed, dtypes and sizes that `unserved` names.
    """
    if not on_gpu(x) or transformed() or observed():
        return None
    device = x.device
    if device.index != torch._C._cuda_getDevice():  # kernels are launched in the current device's context
        return None
    dtype = autocast_dtype(device) or weights.in_proj.dtype
    tensors = (x, residual, *weights) if states is None else (x, residual, *weights, *states)
    if not all(_readable(t, device) for t in tensors) or (residual is not None and residual.shape != x.shape):
        return None
    normed = weights.norm is not None
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if gradient and states is not None:
        return None
    signature = Signature(
        x.shape, x.dtype, None if residual is None else residual.dtype, kept or x.dtype, dtype,
        tuple(None if t is None else (t.dtype, t.shape) for t in weights), eps, device, gradient,
        None if states is None else ((states[0].dtype, states[0].shape), (states[1].dtype, states[1].shape)),
    )  # fmt: skip
    if signature not in _plans:
        _plans[signature] = Plan(signature) if unserved(signature) is None else None
    plan = _plans[signature]
    if plan is None:
        return None
    if not normed and x.dtype != dtype:
        x = x.to(dtype)
    if not gradient:
        return plan.forward(x, residual, weights, states)[:2]
    return _Layer.apply(plan, x, residual, *weights)


def _readable(t: Tensor | None, device: torch.device) -> bool:
    """Whether a kernel may read the tensor by its address, as the plan's kernels do."""
    if t is None:
        return True
    return is_plain(t) and t.device == device and t.is_contiguous() and not t.data_ptr() % ALIGNED


def _dense(t: Tensor) -> Tensor:
    """A gradient as the kernels read it."""
    return t if t.is_contiguous() and not t.data_ptr() % ALIGNED else t.clone(memory_format=torch.contiguous_format)


_COUNT = len(LayerWeights._fields)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, residual: Tensor | None, *weights: Tensor | None):
        out, total, kept = plan.forward(x, residual, LayerWeights(*weights))  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, *kept)
        return out, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None):
        plan, saved = ctx.plan, ctx.saved_tensors  # asked for once: activation checkpointing unpacks each tensor once
        weights, kept = LayerWeights(*saved[:_COUNT]), saved[_COUNT:]
        with torch.no_grad():
            if dy is None:
                dy = torch.zeros(plan.signature.shape, dtype=plan.dtype, device=plan.device)
            rows = _dense(dy).view(plan.rows, plan.h)
            read = None if dtotal is None else _dense(dtotal)
            found = plan.backward(rows, read, kept, weights, ctx.needs_input_grad[1:])
        # The input and the stream are among what was kept.
        return (None, *differentiated_once("fused_mixer", found, (dy, dtotal, *kept[:2], *weights)))
