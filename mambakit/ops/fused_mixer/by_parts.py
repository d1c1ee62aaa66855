"""A whole layer by the ops of its parts, for what no plan serves: `mambakit::whole_layer` on other devices, and
gradients of several outputs at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops._products import product
from mambakit.ops.causal_conv1d.api import causal_conv1d
from mambakit.ops.fused_mixer.layout import memory_size, signature_of
from mambakit.ops.fused_mixer.signature import LayerWeights
from mambakit.ops.rms_norm.api import rms_norm
from mambakit.ops.selection_norm.api import selection_norm
from mambakit.ops.selective_scan.api import selective_scan
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL


def layer(
    entering: Tensor, w: LayerWeights, eps: float, dtype: torch.dtype, log: bool = True, mixer_eps: float | None = None
) -> Tensor:
    """The layer's output (b, l, h) from the residual stream, or without a norm from in_proj's input."""
    r, n = w.dt_proj.shape[1], w.A_log.shape[1]
    y = entering.to(dtype) if w.norm is None else rms_norm(entering, w.norm, eps, out_dtype=dtype)[0]
    in_bias, out_bias = (None if t is None else t.to(dtype) for t in (w.in_bias, w.out_bias))
    if w.in_proj is not None:
        y = F.linear(y, w.in_proj.to(dtype), in_bias)
    u, z = y.chunk(2, -1)
    u, _ = causal_conv1d(u, w.conv.reshape(w.D.shape[0], -1), w.conv_bias)
    selected = F.linear(u, w.x_proj.to(dtype))
    if mixer_eps is not None:
        selected = selection_norm(selected, r, mixer_eps, w.dt_norm, w.B_norm, w.C_norm)
    dt, B, C = selected.split([r, n, n], -1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A = -torch.exp(w.A_log.to(wide)) if log else w.A_log
    delta = F.linear(dt, w.dt_proj.to(dtype))
    y, _ = selective_scan(u, delta, A, B, C, w.D.to(wide), z, w.dt_bias.to(wide), True)
    return y if w.out_proj is None else F.linear(y, w.out_proj.to(dtype), out_bias)


def gradients(
    dy: Tensor, dtotal: Tensor | None, entering: Tensor, w: LayerWeights, eps: float, dtype: torch.dtype, log: bool,
    mixer_eps: float | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """The gradients of the residual stream (or the input) and of the weights."""
    with torch.enable_grad(), no_autocast(entering.device):
        entering = entering.detach().requires_grad_()
        w = LayerWeights(*(None if t is None else t.detach().requires_grad_() for t in w))  # type: ignore[arg-type]
        y = layer(entering, w, eps, dtype, log, mixer_eps)
    given = [t for t in (entering, *w) if t is not None]
    found = iter(torch.autograd.grad(y, given, dy, allow_unused=True))
    dentering = next(found)
    if dtotal is not None:
        dentering = dentering + dtotal
    return dentering, tuple(None if t is None else next(found) for t in w)


def forward(x, residual, *rest):
    """`mambakit::whole_layer`. Its gradient here computes everything again: what would be kept is empty."""
    *weights, eps, kept, dtype, gradient, mixer_eps = rest
    w = LayerWeights(*weights)
    size = memory_size(signature_of(x, residual is not None, w, eps, kept, dtype, gradient, mixer_eps))
    total = x if w.norm is None else x.to(kept) if residual is None else (x.to(kept) + residual).to(kept)
    y = layer(total, w, eps, dtype, mixer_eps=mixer_eps)
    total = x.new_empty(0, dtype=kept) if w.norm is None else total.clone()
    return y, total, x.new_zeros(size, dtype=dtype)


def backward(dy, dtotal, x, has_residual, *rest):
    """`mambakit::whole_layer_backward`, of which autograd does not run below the dispatcher."""
    *weights, total, _, eps, _, dtype, x_dtype, needs, mixer_eps = rest
    w: Any = LayerWeights(*weights)
    entering = x if w.norm is None else total
    y = entering.to(dtype) if w.norm is None else rms_norm(entering, w.norm, eps, out_dtype=dtype)[0]
    in_proj, out_proj = w.in_proj.to(dtype), w.out_proj.to(dtype)
    xz = F.linear(y, in_proj, None if w.in_bias is None else w.in_bias.to(dtype))
    norms = w.dt_norm, w.B_norm, w.C_norm
    inner = (xz, w.conv.reshape(w.D.shape[0], -1), w.conv_bias, w.x_proj, w.dt_proj, w.A_log, w.D, w.dt_bias, *norms)
    mixed, _, _, *memory = torch.ops.mambakit.fused_mixer(
        *inner, None, None, None, False, CHECKPOINT_INTERVAL, mixer_eps
    )
    dy = entering.new_zeros((*y.shape[:2], len(out_proj)), dtype=dtype) if dy is None else dy
    found = torch.ops.mambakit.fused_mixer_backward(
        dy @ out_proj, None, None, *inner, None, None, None, *memory, CHECKPOINT_INTERVAL, True, True, mixer_eps
    )
    dxz, dconv, dconv_bias, dx_proj, ddt_proj, dA_log, dD, ddt_bias, *dnorms = found[:-2]
    dentering, dnorm = dxz @ in_proj, None
    dx, dresidual = dentering.to(x_dtype), None
    if w.norm is not None:
        dx, dnorm, dresidual = torch.ops.mambakit.rms_norm_backward(
            dentering, dtotal, total, w.norm, eps, x_dtype, has_residual
        )
    of_weights = LayerWeights(
        dnorm, _outer(dxz, y, w.in_proj), _summed(dxz, w.in_bias), dconv.view(w.conv.shape), dconv_bias, dx_proj,
        ddt_proj, ddt_bias, dA_log, dD, _outer(dy, mixed, w.out_proj), _summed(dy, w.out_bias),
        *dnorms,
    )  # fmt: skip
    found = zip((dx, dresidual, *of_weights), needs, strict=True)
    return [g.contiguous() for g, needed in found if needed]


def _outer(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight (out, in), in its dtype."""
    return product(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]), weight.new_empty(weight.shape))


def _summed(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else dy.sum((0, 1), dtype=bias.dtype)
