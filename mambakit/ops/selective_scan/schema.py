"""`mambakit::selective_scan`, its gradient and its in-place form, as torch.library ops.

Implementations take exactly these positional arguments and return fresh dense tensors: y in the dtype and layout of u,
the gradients of u, delta and z in theirs (`mambakit/ops/_layout.py`), those of B and C in their shapes and dtypes
(`selection.py`: groups, and 1 for b or l in constants), all others contiguous. A, D, delta_bias and states have the
computation's dtype, float32 or float64. ``checkpoints`` are the states that enter every ``checkpoint_interval``-th
token, (b, ceil(l / interval), d, n), kept for the gradient; an interval of 0 keeps none (an empty tensor). Gradients of
absent arguments are empty tensors.
"""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cpu, implement_on_cuda
from mambakit.ops._layout import empty_as
from mambakit.ops._once import differentiated_once
from mambakit.ops.selective_scan import chunked, cpu

# 64 bytes of state per channel every 64 tokens is 1 byte per element, against 2 for one bfloat16 activation; the CUDA
# gradient was faster with it than with 128 (docs/lab/2026-11-23-scan.md).
CHECKPOINT_INTERVAL = 64

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)


def _state_shape(u, A, cu_seqlens):
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return rows, u.shape[2], A.shape[1]


def state_dtype(*tensors):
    """The dtype of the computation on u, delta, B, C and z (or None): float64 as soon as one of them is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    dtype = state_dtype(u, delta, B, C, z)
    b, length, d = u.shape
    if checkpoint_interval == 0:
        checkpoints = u.new_empty((0,), dtype=dtype)
    else:
        count = (length + checkpoint_interval - 1) // checkpoint_interval
        checkpoints = u.new_empty((b, count, d, A.shape[1]), dtype=dtype)
    return empty_as(u), u.new_empty(_state_shape(u, A, cu_seqlens), dtype=dtype), checkpoints


def _backward_fake(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
):
    dtype = state_dtype(u, delta, B, C, z)
    like = lambda x, dt: u.new_empty((0,), dtype=dt) if x is None else x.new_empty(x.shape, dtype=dt)  # noqa: E731
    return (
        empty_as(u), empty_as(delta), like(A, dtype), like(B, B.dtype), like(C, C.dtype),
        like(D, dtype), like(z, u.dtype) if z is None else empty_as(z), like(delta_bias, dtype),
        like(initial_state, dtype),
    )  # fmt: skip


def _forward_fake_(state, slot_indices, u, *rest):
    return empty_as(u)


define(
    f"selective_scan({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, int checkpoint_interval)"
    " -> (Tensor, Tensor, Tensor)",
    chunked.forward,
    fake,
)
define(
    f"selective_scan_backward(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens,"
    " Tensor checkpoints, int checkpoint_interval)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    chunked.backward,
    _backward_fake,
)
define(
    f"selective_scan_(Tensor(a!) state, Tensor? slot_indices, {_INPUTS}, Tensor? cu_seqlens) -> Tensor",
    chunked.forward_,
    _forward_fake_,
)


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, initial_state, cu_seqlens, interval = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.delta_softplus, ctx.interval = delta_softplus, interval
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dy, dfinal, _):
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = u.new_zeros(u.shape)
    interval = ctx.interval
    if interval == 0:
        interval = CHECKPOINT_INTERVAL
        _, _, checkpoints = torch.ops.mambakit.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial_state, cu_seqlens, interval
        )
    gradients = torch.ops.mambakit.selective_scan_backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus,
        initial_state, cu_seqlens, checkpoints, interval,
    )  # fmt: skip
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = differentiated_once(
        "selective_scan", gradients, (dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    present = lambda x, grad: None if x is None else grad  # noqa: E731
    return (
        du, ddelta, dA, dB, dC, present(D, dD), present(z, dz), present(delta_bias, dbias), None,
        present(initial_state, dinitial), None, None,
    )  # fmt: skip


torch.library.register_autograd("mambakit::selective_scan", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cpu("selective_scan", cpu.forward, cpu.serves)
implement_on_cpu("selective_scan_backward", cpu.backward, cpu.serves)
implement_on_cpu("selective_scan_", cpu.forward_, cpu.serves)

_GPU = "mambakit.ops.selective_scan.cuda"
implement_on_cuda("selective_scan", _GPU, "forward")
implement_on_cuda("selective_scan_backward", _GPU, "backward")
implement_on_cuda("selective_scan_", _GPU, "forward_")
