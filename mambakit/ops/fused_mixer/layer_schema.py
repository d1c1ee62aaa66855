"""`mambakit::whole_layer` and its gradient: a whole layer as one op of a graph that torch.compile makes, which holds
`whole_layer_forward` and `whole_layer_backward`.

Eagerly `layer.py` runs the same plans without an op. After the layer's output and the residual stream the op returns
what its gradient reads (`Layout` says how it is arranged); without a gradient that is an empty tensor, and so is the
stream without a norm. The gradient's op returns those that are needed, in the order of the arguments: results share no
memory, so an empty tensor for each of the others would be an allocation each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cuda, plain_version
from mambakit.ops._once import differentiated_once
from mambakit.ops.fused_mixer import by_parts
from mambakit.ops.fused_mixer.layout import memory_size, signature_of
from mambakit.ops.fused_mixer.signature import LayerWeights

_WEIGHTS = (
    "Tensor? norm, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, "
    "Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, Tensor? out_bias, Tensor? dt_norm, Tensor? B_norm, "
    "Tensor? C_norm"
)
COUNT = len(LayerWeights._fields)


def _fake(x, residual, *rest):
    *weights, eps, kept, dtype, gradient, mixer_eps = rest
    w: Any = LayerWeights(*weights)
    y = x.new_empty((*x.shape[:2], w.out_proj.shape[0]), dtype=dtype)
    total = x.new_empty((0,) if w.norm is None else x.shape, dtype=kept)
    size = memory_size(signature_of(x, residual is not None, w, eps, kept, dtype, gradient, mixer_eps))
    return y, total, x.new_empty(size, dtype=dtype)


def _backward_fake(dy, dtotal, x, has_residual, *rest):
    *weights, total, _, _, kept, _, x_dtype, needs, _ = rest
    like = total if weights[0] is not None else x
    kinds: Any = (
        (like.shape, x_dtype),
        (like.shape, kept),
        *[None if t is None else (t.shape, t.dtype) for t in weights],
    )
    return [like.new_empty(kind[0], dtype=kind[1]) for kind, needed in zip(kinds, needs, strict=True) if needed]


# Code that torch.compile made is on users' disks, found by the names of the ops in the model's graph: a schema that
# changes takes other names, or that code calls it as it was.
_FORWARD = (
    f"(Tensor x, Tensor? residual, {_WEIGHTS}, float eps, ScalarType kept, ScalarType dtype, bool gradient,"
    " float? mixer_eps) -> (Tensor, Tensor, Tensor)"
)
define("whole_layer" + _FORWARD, by_parts.forward, _fake)
# The same without a gradient of its own. It is what a graph holds: an op with a gradient written in Python is a second
# call of Python's for each call of the graph's, a fifth of the host's time of a layer.
define("whole_layer_forward" + _FORWARD, by_parts.forward, _fake)
define(
    f"whole_layer_backward(Tensor? dy, Tensor? dtotal, Tensor? x, bool has_residual, {_WEIGHTS}, Tensor total,"
    " Tensor memory, float eps, ScalarType kept, ScalarType dtype, ScalarType x_dtype, bool[] needs, float? mixer_eps)"
    " -> Tensor[]",
    by_parts.backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, *weights, ctx.eps, ctx.kept, ctx.dtype, _, ctx.mixer_eps = inputs
    ctx.set_materialize_grads(False)
    ctx.has_residual, ctx.x_dtype = residual is not None, x.dtype
    ctx.save_for_backward(x if weights[0] is None else None, *weights, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any):
    x, *rest = ctx.saved_tensors
    weights, kept = rest[:COUNT], rest[COUNT:]
    needs = list(ctx.needs_input_grad[: 2 + COUNT])
    wanted = iter(
        torch.ops.mambakit.whole_layer_backward(
            dy, dtotal, x, ctx.has_residual, *weights, *kept, ctx.eps, ctx.kept, ctx.dtype, ctx.x_dtype, needs,
            ctx.mixer_eps,
        )
    )  # fmt: skip
    found = tuple([next(wanted) if needed else None for needed in needs])
    found = differentiated_once("fused_mixer", found, (dy, dtotal, x, kept[0], *weights))
    return *found, None, None, None, None, None


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.mambakit.whole_layer_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _autograd(*inputs: Any):
    """`mambakit::whole_layer` where autograd sees it."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _Differentiable.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mambakit.whole_layer_forward(*inputs)


LIBRARY.impl("whole_layer", _autograd, "Autograd")
# Gradients of several outputs at once, by torch.autograd.grad and by torch.func.vmap. Torch's own rule, a loop over the
# batch, serves no op that returns a list.
for _key in ("Batched", "FuncTorchBatched"):
    LIBRARY.impl("whole_layer_backward", plain_version("whole_layer_backward"), _key)

_GPU = "mambakit.ops.fused_mixer.layer_op"
for _name in ("whole_layer", "whole_layer_forward"):
    implement_on_cuda(_name, _GPU, "forward", checks=True)
implement_on_cuda("whole_layer_backward", _GPU, "backward", checks=True)
