"""`mambakit::linear`, `mambakit::dequantize` that its gradient reads, and `mambakit::normed_linear`, as torch.library
ops.

A packed weight is five tensors (``data``, and those that its format has of ``scales``, ``starts``, ``columns`` and
``values``), the format's name and two sizes; `packed.py` says what they hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambakit.ops._autocast import no_autocast
from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cpu, implement_on_cuda
from mambakit.ops._releases import count_flops
from mambakit.ops.linear import chunked, cpu
from mambakit.ops.linear.packed import PackedWeight

_WEIGHT = "Tensor data, Tensor? scales, Tensor? starts, Tensor? columns, Tensor? values"
_SIZES = "str format, int in_features, int group"


def parts_of(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    """The five tensors of the schema."""
    return weight.data, weight.scales, *(weight.exceptions or (None, None, None))


def packed_of(data, scales, starts, columns, values, format, in_features, group) -> PackedWeight:
    exceptions = None if starts is None else (starts, columns, values)
    return PackedWeight(format, data, scales, in_features, group, exceptions)


def _linear(x, data, scales, starts, columns, values, bias, *sizes):
    return chunked.linear(x, packed_of(data, scales, starts, columns, values, *sizes), bias)


def _linear_on_cpu(x, data, scales, starts, columns, values, bias, *sizes):
    weight = packed_of(data, scales, starts, columns, values, *sizes)
    if weight.format not in cpu.KINDS:
        return chunked.linear(x, weight, bias)
    if x.numel() // max(1, x.shape[-1]) <= cpu.MOST_ROWS:
        return cpu.linear(x, weight, bias)
    return chunked.linear(x, weight, bias, cpu.widen(weight))


def _dequantize(*weight):
    return _fresh(packed_of(*weight).dequantized(), weight[0])


def _dequantize_on_cpu(*weight):
    packed = packed_of(*weight)
    return _fresh(cpu.widen(packed) if packed.format in cpu.KINDS else packed.dequantized(), weight[0])


def _fresh(widened: Tensor, data: Tensor) -> Tensor:
    """An op's result is no input: of the format float32 the numbers are copied."""
    return widened.clone() if widened is data else widened


def _linear_fake(x, data, *rest):
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def _dequantize_fake(data, scales, starts, columns, values, format, in_features, group):
    return data.new_empty((data.shape[0], in_features), dtype=torch.float32)


def _normed_linear(x, norm, residual, eps, residual_dtype, dtype, *weight_and_bias):
    y, kept = torch.ops.mambakit.rms_norm(x, norm, residual, eps, residual_dtype, dtype)
    return torch.ops.mambakit.linear(y, *weight_and_bias), kept


def _normed_linear_fake(x, norm, residual, eps, residual_dtype, dtype, data, *rest):
    y = x.new_empty((*x.shape[:-1], data.shape[0]), dtype=dtype)
    return y, x.new_empty(x.shape, dtype=residual_dtype)


define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_SIZES}) -> Tensor", _linear, _linear_fake)
define(f"dequantize({_WEIGHT}, {_SIZES}) -> Tensor", _dequantize, _dequantize_fake)
# Without a gradient: `api.normed_linear` calls the two ops where one is asked for.
define(
    "normed_linear(Tensor x, Tensor norm, Tensor? residual, float eps, ScalarType residual_dtype, ScalarType dtype, "
    f"{_WEIGHT}, Tensor? bias, {_SIZES}) -> (Tensor, Tensor)",
    _normed_linear,
    _normed_linear_fake,
)


def _setup_context(ctx, inputs, output):
    x, *weight, bias, format, in_features, group = inputs
    ctx.save_for_backward(*weight)
    ctx.sizes = format, in_features, group
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx, dy):
    # Plain PyTorch from here, which autograd differentiates again.
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    dx = dbias = None
    dy = dy.to(dtype)
    with no_autocast(dy.device):
        if ctx.needs_input_grad[0]:
            dx = (dy @ torch.ops.mambakit.dequantize(*ctx.saved_tensors, *ctx.sizes).to(dtype)).to(ctx.dtype)
    if ctx.needs_input_grad[6]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, *[None] * 5, dbias, *[None] * 3


torch.library.register_autograd("mambakit::linear", _backward, setup_context=_setup_context, lib=LIBRARY)

implement_on_cpu("linear", _linear_on_cpu, lambda x, *_: x.dtype != torch.float64)
implement_on_cpu("dequantize", _dequantize_on_cpu, lambda *_: True)

_GPU = "mambakit.ops.linear.triton"
implement_on_cuda("linear", _GPU, "linear")
implement_on_cuda("dequantize", _GPU, "dequantize")
implement_on_cuda("normed_linear", _GPU, "normed_linear")


def _flops(x_shape, data_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * data_shape[0]


count_flops(torch.ops.mambakit.linear, _flops)
