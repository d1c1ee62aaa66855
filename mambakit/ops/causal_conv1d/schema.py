"""`mambakit::causal_conv1d`, its gradient and its in-place form, as torch.library ops.

Implementations take exactly these positional arguments and return fresh dense tensors: y and the gradient of x in the
layout of x (`mambakit/ops/_layout.py`), all others contiguous. ``activation`` is "" or "silu". Gradients of absent
arguments are empty tensors.
"""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cpu, implement_on_cuda
from mambakit.ops._layout import empty_as
from mambakit.ops._once import differentiated_once
from mambakit.ops.causal_conv1d import chunked, cpu

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, str activation"


def _fake(x, weight, bias, activation, initial_state, cu_seqlens):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return empty_as(x), x.new_empty((rows, x.shape[2], weight.shape[1] - 1))


def _backward_fake(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens):
    return (
        empty_as(x),
        weight.new_empty(weight.shape),
        weight.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,)) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _forward_fake_(state, slot_indices, x, *rest):
    return empty_as(x)


define(
    f"causal_conv1d({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    chunked.forward,
    _fake,
)
define(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    chunked.backward,
    _backward_fake,
)
define(
    f"causal_conv1d_(Tensor(a!) state, Tensor? slot_indices, {_INPUTS}, Tensor? cu_seqlens) -> Tensor",
    chunked.forward_,
    _forward_fake_,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, activation, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.activation = activation


def _backward(ctx, dy, dfinal):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(x.shape)
    gradients = torch.ops.mambakit.causal_conv1d_backward(
        dy, dfinal, x, weight, bias, ctx.activation, initial_state, cu_seqlens
    )
    dx, dweight, dbias, dinitial = differentiated_once(
        "causal_conv1d", gradients, (dy, dfinal, x, weight, bias, initial_state)
    )
    return dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial, None


torch.library.register_autograd("mambakit::causal_conv1d", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cpu("causal_conv1d", cpu.forward, cpu.serves)
implement_on_cpu("causal_conv1d_backward", cpu.backward, cpu.serves_backward)
implement_on_cpu("causal_conv1d_", cpu.forward_, cpu.serves_in_place)

_GPU = "mambakit.ops.causal_conv1d.triton"
implement_on_cuda("causal_conv1d", _GPU, "forward")
implement_on_cuda("causal_conv1d_backward", _GPU, "backward")
implement_on_cuda("causal_conv1d_", _GPU, "forward_")
