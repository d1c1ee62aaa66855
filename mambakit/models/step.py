"""One token through a model: the fastest way there is for where the model lies and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules import MambaBlock, MambaCache, MambaMixer
from mambakit.modules.hooks import hooked, hooked_globally
from mambakit.modules.mixer import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops import native
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import MOST_ROWS, PackedWeight
from mambakit.ops.native.decode import DecodeStep, LayerWeights

_LINEAR = (nn.Linear, QuantizedLinear)


def token_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """``step(tokens (b,)) -> logits (b, v)``; the cache is brought up to date in place, and must not be replaced meanwhile.

    On a CPU a plain model's step is one call into the native library; on CUDA it is a graph. Anything else (on a CPU adapters or
    replaced layers, other activations, FalconMamba, more than 16 rows, no native library) runs the model's own forward.
    """
    if native_serves(model, cache):
        return native_step(model, cache)
    from mambakit.models.graph_step import graph_token_step, graphs_serve  # which imports from here

    return graph_token_step(model, cache) if graphs_serve(model) else forward_step(model, cache)


def forward_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    def step(tokens: Tensor) -> Tensor:
        return model(tokens[:, None], cache_params=cache).logits[:, -1]

    return step


def native_serves(model: Any, cache: MambaCache) -> bool:
    """Whether a token of this model, from this state, can be one call into the native library."""
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
    if has_hooks(model):
        return False
    for block in model.backbone.layers:
        m = block.mixer
        if type(block) is not MambaBlock or type(m) is not MambaMixer:
            return False
        if m.act is not None or m.mixer_rms_eps is not None or type(m.dt_proj) is not TimeStepProjection:
            return False
        if any(type(linear) not in _LINEAR for linear in (m.in_proj, m.x_proj, m.out_proj)):
            return False
    return True


def modules_of(module: nn.Module, found: list[nn.Module] | None = None) -> list[nn.Module]:
    """``module.modules()`` in a tenth of the time; a shared module comes as often as it is named."""
    found = [] if found is None else found
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            modules_of(child, found)
    return found


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, which one call into C would pass by."""
    return hooked_globally() or any(hooked(m) for m in modules_of(model)[1:])


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


def native_step(model: Any, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    layers, head = native_weights(model)
    backbone = model.backbone
    run = DecodeStep(
        layers, backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
        cache.conv_states, cache.ssm_states,
    )  # fmt: skip

    def step(tokens: Tensor) -> Tensor:
        logits = run(backbone.embeddings(tokens))
        cache.advance(1)
        return logits.clone()

    return step
