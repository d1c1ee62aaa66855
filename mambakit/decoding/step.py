"""One token through a model: the fastest way there is for where the model lies and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules import MambaBlock, MambaCache, MambaMixer, RMSNorm
from mambakit.modules.interception import Watch, any_intercepted, is_ours, modules_of
from mambakit.modules.mixers.mamba import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops import causal_conv1d, selective_scan
from mambakit.ops._backends import native
from mambakit.ops._backends.memory import is_plain, observed, transformed
from mambakit.ops.decode.cpu import DecodeStep, LayerWeights
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import MOST_ROWS, PackedWeight

_LINEAR = (nn.Linear, QuantizedLinear)
_DTYPES = (torch.float32, torch.bfloat16)


def token_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """``step(tokens (b,)) -> logits (b, v)``; the cache is brought up to date in place, and must not be replaced meanwhile.

    On a CPU a plain model's step is one call into the native library; on CUDA it is a graph. Anything else (on a CPU adapters or
    replaced or hooked layers, weights that are no plain tensors, other activations, FalconMamba, more than 16 rows, no native library) runs the model's own forward.
    """
    if native_serves(model, cache):
        return native_step(model, cache)
    from mambakit.decoding.graph_step import graph_token_step, graphs_serve  # which imports from here

    return graph_token_step(model, cache) if graphs_serve(model) else forward_step(model, cache)


def forward_step(model: Any, cache: Any) -> Callable[[Tensor], Tensor]:
    def step(tokens: Tensor) -> Tensor:
        return model(tokens[:, None], cache_params=cache).logits[:, -1]

    return step


def made_of_known(model: Any) -> bool:
    """Whether the model is plain Mamba layers as they were built, which a step may read by their weights instead of calling them."""
    config, backbone = model.config, model.backbone
    if not is_ours(backbone):
        return False
    layers = list(backbone.layers)
    if not layers or len(layers) != config.num_hidden_layers or not config.residual_in_fp32:
        return False
    if not 2 <= config.conv_kernel <= 8 or type(backbone.embeddings) is not nn.Embedding:
        return False
    if type(model.lm_head) not in _LINEAR or model.lm_head.bias is not None:
        return False
    if not _plain_norm(backbone.norm_f, config):
        return False
    for i, block in enumerate(layers):
        if type(block) is not MambaBlock:
            return False
        m = block.mixer
        if not block.residual_in_fp32 or not _plain_norm(block.norm, config):
            return False
        if type(m) is not MambaMixer or type(m.conv1d) is not nn.Conv1d or type(m.dt_proj) is not TimeStepProjection:
            return False
        if m.layer_idx != i or m.act is not None or m.mixer_rms_eps is not None:
            return False
        if m.causal_conv1d is not causal_conv1d or m.selective_scan is not selective_scan:
            return False
        if any(type(linear) not in _LINEAR for linear in (m.in_proj, m.x_proj, m.out_proj)):
            return False
    return True


def _plain_norm(norm: nn.Module, config: Any) -> bool:
    return type(norm) is RMSNorm and norm.eps == config.layer_norm_epsilon


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    return [t for m in modules for held in (m._parameters, m._buffers) for t in held.values() if t is not None]


def passed_by(model: nn.Module, called: bool) -> list[nn.Module]:
    """The modules that a step by weights does not call: without the model itself where it is in its own forward."""
    return modules_of(model)[1:] if called else modules_of(model)


def native_serves(model: Any, cache: Any, called: bool = False) -> bool:
    """Whether a token of this model, from this state, can be one call into the native library.

    Args:
        called: the model is in its own forward: its hooks have been called.
    """
    if model.device.type != "cpu" or not native.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if not 1 <= cache.max_batch_size <= MOST_ROWS or model.dtype not in _DTYPES or cache.dtype not in _DTYPES:
        return False
    modules = passed_by(model, called)
    if transformed() or observed() or not made_of_known(model) or any_intercepted(modules):
        return False
    tensors = tensors_of(modules)
    plain = all(t.device.type == "cpu" and is_plain(t) for t in (*tensors, cache.conv_states, cache.ssm_states))
    return plain and all(t.dtype in _DTYPES for t in tensors if t.dtype.is_floating_point)


def native_weights(model: Any) -> tuple[list[LayerWeights], PackedWeight]:
    """The layers and the head as the native library reads them: the weights themselves, nothing is copied but A."""
    format = str(model.dtype).removeprefix("torch.")

    def packed(linear: Any) -> PackedWeight:
        return linear.packed if isinstance(linear, QuantizedLinear) else pack(linear.weight, format)

    layers = [
        LayerWeights(
            norm=block.norm.weight, in_proj=packed(m.in_proj), in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=packed(m.x_proj),
            dt_proj=packed(m.dt_proj), dt_bias=m.dt_proj.bias, A=-torch.exp(m.A_log), D=m.D,
            out_proj=packed(m.out_proj), out_proj_bias=m.out_proj.bias,
        )
        for block in model.backbone.layers for m in [block.mixer]
    ]  # fmt: skip
    return layers, packed(model.lm_head)


def native_step(model: Any, cache: Any, called: bool = False) -> Callable[[Tensor], Tensor]:
    """`token_step` by the native library; by the model's forward from the moment that somebody puts a hook or a forward on a module."""
    layers, head = native_weights(model)
    backbone = model.backbone
    run = DecodeStep(
        layers, backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
        cache.conv_states, cache.ssm_states,
    )  # fmt: skip

    watch, forward = Watch(passed_by(model, called)), forward_step(model, cache)

    def step(tokens: Tensor) -> Tensor:
        if not watch.holds():
            return forward(tokens)
        logits = run(backbone.embeddings(tokens))
        cache.advance(1)
        return logits.clone()

    return step
