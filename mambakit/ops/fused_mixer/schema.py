"""`mambakit::fused_mixer` and its gradient, as torch.library ops. Gradients of absent arguments are empty tensors.

After y and the two states the op returns what its gradient reads: the convolution's output, delta, x_proj's output and
the scan's checkpoints. They are empty tensors where the interval of checkpoints is 0; the first two also where
``recompute``.
"""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define
from mambakit.ops._once import differentiated_once
from mambakit.ops.fused_mixer import composed
from mambakit.ops.selective_scan import schema as scan_schema

_INPUTS = (
    "Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_weight, Tensor dt_weight, Tensor A_log, Tensor D, "
    "Tensor dt_bias, Tensor? dt_norm, Tensor? B_norm, Tensor? C_norm, Tensor? conv_state, Tensor? ssm_state, "
    "Tensor? cu_seqlens"
)
_KEPT = "Tensor x, Tensor delta, Tensor selected, Tensor checkpoints"


def _fake(
    xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, dt_norm, B_norm, C_norm, conv_state, ssm_state,
    cu_seqlens, recompute, interval, mixer_eps,
):  # fmt: skip
    b, length, _ = xz.shape
    d, k = conv_weight.shape
    channels, nothing = xz.new_empty((b, length, d)), xz.new_empty((0,))
    y, ssm_final, checkpoints = scan_schema.fake(
        channels, channels, A_log, None, None, None, None, None, True, ssm_state, cu_seqlens, interval
    )
    conv_final = xz.new_empty((ssm_final.shape[0], d, k - 1))
    selected = nothing if interval == 0 else xz.new_empty((b, length, x_weight.shape[0]))
    none_kept = interval == 0 or recompute
    x, delta = (xz.new_empty((0,)) if none_kept else xz.new_empty((b, length, d)) for _ in range(2))
    return y, conv_final, ssm_final, x, delta, selected, checkpoints


def _backward_fake(
    dy, dconv_final, dssm_final, xz, conv_weight, conv_bias, x_weight, dt_weight, A_log, D, dt_bias, dt_norm, B_norm,
    C_norm, conv_state, ssm_state, cu_seqlens, x, delta, selected, checkpoints, interval, needs_x_weight,
    needs_dt_weight, mixer_eps,
):  # fmt: skip
    wide = torch.float64 if xz.dtype == torch.float64 else torch.float32

    def like(t, dtype=None):
        return xz.new_empty((0,)) if t is None else torch.empty_like(t, dtype=dtype, memory_format=_CONTIGUOUS)

    return (
        like(xz), like(conv_weight), like(conv_bias), like(x_weight if needs_x_weight else None),
        like(dt_weight if needs_dt_weight else None), like(A_log, wide), like(D, wide), like(dt_bias, wide),
        like(dt_norm), like(B_norm), like(C_norm), like(conv_state), like(ssm_state),
    )  # fmt: skip


_CONTIGUOUS = torch.contiguous_format
_DIFFERENTIATED = 13  # of `_INPUTS`, all but cu_seqlens

define(
    f"fused_mixer({_INPUTS}, bool recompute, int checkpoint_interval, float? mixer_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composed.forward,
    _fake,
)
define(
    f"fused_mixer_backward(Tensor? dy, Tensor? dconv_final, Tensor? dssm_final, {_INPUTS}, {_KEPT},"
    " int checkpoint_interval, bool needs_x_weight, bool needs_dt_weight, float? mixer_eps)"
    " -> (" + ", ".join(["Tensor"] * _DIFFERENTIATED) + ")",
    composed.backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.interval, ctx.mixer_eps = inputs
    kept = output[3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)


def _backward(ctx, dy, dconv_final, dssm_final, *_):
    saved = ctx.saved_tensors  # asked for once: activation checkpointing unpacks each tensor once
    tensors, kept = saved[:-4], saved[-4:]
    gradients = (dy, dconv_final, dssm_final)
    found = torch.ops.mambakit.fused_mixer_backward(
        *gradients, *tensors, *kept, ctx.interval, ctx.needs_input_grad[3], ctx.needs_input_grad[4],
        ctx.mixer_eps,
    )  # fmt: skip
    inputs = tensors[:_DIFFERENTIATED]
    wanted = zip(found, inputs, ctx.needs_input_grad[:_DIFFERENTIATED], strict=True)
    found = tuple(g if needed and t is not None else None for g, t, needed in wanted)
    found = differentiated_once("fused_mixer", found, (*gradients, *inputs))
    return *found, None, None, None, None


torch.library.register_autograd("mambakit::fused_mixer", _backward, setup_context=_setup_context, lib=LIBRARY)
