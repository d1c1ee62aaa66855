"""`mambakit::linear_cross_entropy` as a torch.library op, with its gradient.

Implementations take exactly these positional arguments and return the summed loss, and its gradients in ``hidden`` and
``weight`` (empty tensors where not asked for), in fresh contiguous tensors.
"""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cuda
from mambakit.ops._once import differentiated_once
from mambakit.ops.linear_cross_entropy import chunked


def _fake(hidden, weight, targets, ignore_index, need_dhidden, need_dweight):
    return (
        hidden.new_empty((), dtype=chunked.loss_dtype(hidden, weight)),
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
    )


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_dhidden,"
    " bool need_dweight) -> (Tensor, Tensor, Tensor)",
    chunked.forward,
    _fake,
)


def _setup_context(ctx, inputs, output):
    *_, ctx.need_dhidden, ctx.need_dweight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, dloss, _dhidden, _dweight):
    loss, *gradients = ctx.saved_tensors
    dhidden, dweight = differentiated_once("linear_cross_entropy", tuple(gradients), (loss,))
    given = dloss is not None
    # dloss stays a tensor: reading it would stall the stream.
    return (
        (dhidden * dloss).to(dhidden.dtype) if given and ctx.need_dhidden else None,
        (dweight * dloss).to(dweight.dtype) if given and ctx.need_dweight else None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("mambakit::linear_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cuda("linear_cross_entropy", "mambakit.ops.linear_cross_entropy.triton", "forward")
