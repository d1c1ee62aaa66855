"""`mambakit::rms_norm` and its gradient, as torch.library ops. Gradients of absent arguments are empty tensors."""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cpu, implement_on_cuda
from mambakit.ops._once import differentiated_once
from mambakit.ops.rms_norm import chunked, cpu


def _fake(x, weight, residual, eps, residual_dtype, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape, dtype=residual_dtype)


def _backward_fake(dy, dresidual_out, residual_out, weight, eps, x_dtype, has_residual):
    return (
        residual_out.new_empty(residual_out.shape, dtype=x_dtype),
        residual_out.new_empty((0,)) if weight is None else weight.new_empty(weight.shape),
        residual_out.new_empty(residual_out.shape if has_residual else (0,)),
    )


define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps, ScalarType residual_dtype, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    chunked.forward,
    _fake,
)
define(
    "rms_norm_backward(Tensor dy, Tensor? dresidual_out, Tensor residual_out, Tensor? weight, float eps,"
    " ScalarType x_dtype, bool has_residual) -> (Tensor, Tensor, Tensor)",
    chunked.backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, residual, eps, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)
    ctx.eps, ctx.x_dtype, ctx.has_residual = eps, x.dtype, residual is not None


def _backward(ctx, dy, dresidual_out):
    residual_out, weight = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(residual_out)
    gradients = torch.ops.mambakit.rms_norm_backward(
        dy, dresidual_out, residual_out, weight, ctx.eps, ctx.x_dtype, ctx.has_residual
    )
    dx, dweight, dresidual = differentiated_once("rms_norm", gradients, (dy, dresidual_out, residual_out, weight))
    return dx, None if weight is None else dweight, dresidual if ctx.has_residual else None, None, None, None


torch.library.register_autograd("mambakit::rms_norm", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cpu("rms_norm", cpu.forward, cpu.serves)
implement_on_cpu("rms_norm_backward", cpu.backward, cpu.serves)

_GPU = "mambakit.ops.rms_norm.triton"
implement_on_cuda("rms_norm", _GPU, "forward")
implement_on_cuda("rms_norm_backward", _GPU, "backward")
