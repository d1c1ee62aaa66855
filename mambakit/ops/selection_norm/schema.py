"""`mambakit::selection_norm` and its gradient, as torch.library ops. Gradients of absent weights are empty tensors."""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cpu, implement_on_cuda
from mambakit.ops._once import differentiated_once
from mambakit.ops.selection_norm import chunked, cpu

_WEIGHTS = "Tensor? dt_weight, Tensor? B_weight, Tensor? C_weight"


def _fake(selected, dt_weight, B_weight, C_weight, rank, eps):
    return selected.new_empty(selected.shape)


def _backward_fake(dy, selected, *rest):
    weights = rest[:3]
    nothing = selected.new_empty((0,), dtype=torch.float64 if selected.dtype == torch.float64 else torch.float32)
    return (
        selected.new_empty(selected.shape),
        *(nothing.clone() if w is None else w.new_empty(w.shape) for w in weights),
    )


define(f"selection_norm(Tensor selected, {_WEIGHTS}, int rank, float eps) -> Tensor", chunked.forward, _fake)
define(
    f"selection_norm_backward(Tensor dy, Tensor selected, {_WEIGHTS}, int rank, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    chunked.backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    selected, *weights, ctx.rank, ctx.eps = inputs
    ctx.save_for_backward(selected, *weights)


def _backward(ctx, dy):
    selected, *weights = ctx.saved_tensors
    found = torch.ops.mambakit.selection_norm_backward(dy, selected, *weights, ctx.rank, ctx.eps)
    dselected, *dweights = differentiated_once("selection_norm", found, (dy, selected, *weights))
    return dselected, *(None if w is None else g for g, w in zip(dweights, weights, strict=True)), None, None


torch.library.register_autograd("mambakit::selection_norm", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cpu("selection_norm", cpu.forward, cpu.serves)
implement_on_cpu("selection_norm_backward", cpu.backward, cpu.serves)

_GPU = "mambakit.ops.selection_norm.triton"
implement_on_cuda("selection_norm", _GPU, "forward")
implement_on_cuda("selection_norm_backward", _GPU, "backward")
