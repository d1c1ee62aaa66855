"""A layer's projections: in training under autocast, gradients of float32 weights that are never rounded to half; in
inference on a CPU, products of bfloat16 that torch would emulate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.modules.interception import untouched
from mambakit.ops._autocast import autocast_dtype
from mambakit.ops._backends.memory import all_plain, transformed
from mambakit.ops._once import differentiated_once
from mambakit.ops._products import linear, may_be_emulated, product


def in_training() -> bool:
    """Whether gradients are wanted, by plain autograd."""
    return torch.is_grad_enabled() and not transformed()


def project(module: Any, x: Tensor) -> Tensor:
    """``module(x)`` of a linear layer; where autocast runs a float32 weight in half, its gradient is never rounded to
    half. Without gradients, by the faster arithmetic (`mambakit.ops._products.linear`)."""
    if may_be_emulated(x) and not torch.is_grad_enabled() and untouched(module, nn.Linear):
        return linear(x, module.weight, module.bias)
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
        return differentiated_once("projection", gradients, (dy, x, weight, bias))

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
