"""One token through a model: the fastest way there is for where the model lies and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules import MambaCache
from mambakit.modules.mixer import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops import native
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import MOST_ROWS, PackedWeight
from mambakit.ops.native.decode import DecodeStep, LayerWeights

_LINEAR = (nn.Linear, QuantizedLinear)


def token_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """``step(tokens (b,)) -> logits (b, v)``; the cache is brought up to date in place, and must not be replaced meanwhile.

    On a CPU a plain model's step is one call into the native library. Anything else (a GPU, adapters or replaced layers,
    other activations, FalconMamba, more than 16 rows, no native library) runs the model's own forward.
    """
    return _native_step(model, cache) if _native_serves(model, cache) else _forward_step(model, cache)


def _forward_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    def step(tokens: Tensor) -> Tensor:
        return model(tokens[:, None], cache_params=cache).logits[:, -1]

    return step


def _native_serves(model: Any, cache: MambaCache) -> bool:
    config = model.config
    if model.device.type != "cpu" or native.describe()["isa"] is None or torch.is_autocast_enabled("cpu"):
        return False
    if not 1 <= cache.max_batch_size <= MOST_ROWS or model.dtype not in (torch.float32, torch.bfloat16):
        return False
    if cache.dtype not in (torch.float32, torch.bfloat16) or config.num_hidden_layers == 0:
        return False
    if not 2 <= config.conv_kernel <= 8 or not config.residual_in_fp32:
        return False
    if type(model.lm_head) not in _LINEAR or type(model.backbone.embeddings) is not nn.Embedding:
        return False
    for block in model.backbone.layers:
        m = block.mixer
        if m.act is not None or m.mixer_rms_eps is not None or type(m.dt_proj) is not TimeStepProjection:
            return False
        if any(type(linear) not in _LINEAR for linear in (m.in_proj, m.x_proj, m.out_proj)):
            return False
    return True


def _native_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    format = str(model.dtype).removeprefix("torch.")

    def packed(linear: Any) -> PackedWeight:  # the weights themselves: nothing is copied
        return linear.packed if isinstance(linear, QuantizedLinear) else pack(linear.weight, format)

    layers = []
    for block in model.backbone.layers:
        m = block.mixer
        layers.append(
            LayerWeights(
                norm=block.norm.weight, in_proj=packed(m.in_proj), in_proj_bias=m.in_proj.bias,
                conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=packed(m.x_proj),
                dt_proj=packed(m.dt_proj), dt_bias=m.dt_proj.bias, A=-torch.exp(m.A_log), D=m.D,
                out_proj=packed(m.out_proj), out_proj_bias=m.out_proj.bias,
            )
        )  # fmt: skip
    backbone = model.backbone
    run = DecodeStep(
        layers, backbone.norm_f.weight, packed(model.lm_head), model.config.layer_norm_epsilon,
        cache.conv_states, cache.ssm_states,
    )  # fmt: skip

    def step(tokens: Tensor) -> Tensor:
        logits = run(backbone.embeddings(tokens))
        cache.advance(1)
        return logits.clone()

    return step
