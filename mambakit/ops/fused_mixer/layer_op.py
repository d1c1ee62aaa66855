"""`mambakit::fused_layer` and its gradient on NVIDIA GPUs: the plans that `layer.py` runs eagerly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends.memory import all_plain
from mambakit.ops.fused_mixer import by_parts
from mambakit.ops.fused_mixer.layer import dense, plan_of, without_dispatch
from mambakit.ops.fused_mixer.layout import signature_of
from mambakit.ops.fused_mixer.signature import LayerWeights, kinds_of


def _plan(
    x: Tensor, has_residual: bool, w: LayerWeights, eps: float, kept, dtype, gradient: bool, x_dtype,
    mixer_eps: float | None,
) -> Any:  # fmt: skip
    """The plan, or None where the parts serve the call: what is wrapped is read by no kernel."""
    if not all_plain((x, *w)) or x.device.index != torch._C._cuda_getDevice():
        return None
    signature = signature_of(x, has_residual, w, eps, kept, dtype, gradient, mixer_eps)
    return plan_of(signature._replace(weights=kinds_of(signature.weights.each), x=x_dtype))


def forward(x, residual, *rest):
    """`mambakit::fused_layer`."""
    *weights, eps, kept, dtype, gradient, mixer_eps = rest
    w: Any = LayerWeights(*[None if t is None else dense(t) for t in weights])  # type: ignore[arg-type]
    plan = _plan(x, residual is not None, w, eps, kept, dtype, gradient, x.dtype, mixer_eps)
    if plan is None:
        return by_parts.forward(x, residual, *rest)
    with without_dispatch():
        entering = dense(x if plan.layout.normed else x.to(dtype))
        y, total, memory = plan.forward(entering, None if residual is None else dense(residual), w)
        total = x.new_empty(0, dtype=kept) if total is None else total
        return y, total, memory[: plan.layout.kept_count] if gradient else x.new_empty(0, dtype=dtype)


def backward(dy, dtotal, x, has_residual, *rest):
    """`mambakit::fused_layer_backward`."""
    *weights, total, memory, eps, kept, dtype, x_dtype, needs, mixer_eps = rest
    w: Any = LayerWeights(*[None if t is None else dense(t) for t in weights])  # type: ignore[arg-type]
    like = x if w.norm is None else total
    plan = _plan(like, has_residual, w, eps, kept, dtype, True, x_dtype, mixer_eps)
    if plan is None or not all_plain((dy, dtotal)):
        return by_parts.backward(dy, dtotal, x, has_residual, *rest)
    o = plan.layout
    with without_dispatch():
        if dy is None:
            dy = like.new_zeros((o.rows, o.out), dtype=dtype)
        entering = None if x is None else dense(x.to(dtype))
        found = plan.backward(
            dense(dy).view(o.rows, o.out), None if dtotal is None else dense(dtotal),
            (entering, None if w.norm is None else total, memory), w, (True, *needs[1:]),
        )  # fmt: skip
        dx, *others = found
        nothing = like.new_empty(0)
        return dx.to(x_dtype), *(nothing if g is None else g for g in others)
