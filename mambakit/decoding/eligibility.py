"""Whether the decode kernels support a model, and why not. This is the only such check.

A kernel reads the weights of modules without calling them. The result is the model's own only if every module has the
expected class, without a hook or a replaced forward, and every tensor is plain memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules import MambaBlock, MambaMixer, MixerNorm, RMSNorm
from mambakit.modules.interception import any_intercepted, is_causal, is_filter, is_ours, modules_of, untouched
from mambakit.modules.mixers.time_steps import TimeStepProjection
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops import causal_conv1d, selective_scan
from mambakit.ops._backends.memory import all_plain, observed, transformed

_LINEAR = (nn.Linear, QuantizedLinear)


def skipped_modules(model: nn.Module, called: bool = False) -> list[nn.Module]:
    """The modules that a step by weights does not call; without the model itself where its own forward is running."""
    return modules_of(model)[1:] if called else modules_of(model)


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of these modules, not of their submodules."""
    return [t for m in modules for table in (m._parameters, m._buffers) for t in table.values() if t is not None]


def why_not_by_layers(model: Any) -> str | None:
    """Why `mambakit.decoding.verify.LayersVerifier` may not run this model, or None where it may.

    It calls norms and projections one by one, but neither the model nor its blocks, mixers and convolutions.
    Other activations and adapters are supported.
    """
    if transformed():
        return "the call is traced or transformed"
    if not is_ours(model) or not is_ours(model.backbone):
        return "the model or its backbone has a hook or another forward"
    for i, block in enumerate(model.backbone.layers):
        if not untouched(block, MambaBlock):
            return f"layer {i} is no plain MambaBlock"
        if (reason := _why_not_mixer(block.mixer, i)) is not None:
            return f"layer {i}: {reason}"
        if not (untouched(block.mixer, MambaMixer) and is_filter(block.mixer.conv1d, 0)):
            return f"layer {i} has a hook or another forward"
    return None


def why_not_by_weights(model: Any, called: bool = False) -> str | None:
    """Why a step may not read the model's weights instead of calling its modules, or None where it may.

    It needs Mamba-1 layers as this library builds them, without hooks, of plain tensors.

    Args:
        called: whether this is asked inside the model's own forward, whose hooks have run already.
    """
    if transformed() or observed():
        return "the call is traced, transformed or observed"
    if (reason := _why_not_known(model)) is not None:
        return reason
    modules = skipped_modules(model, called)
    if any_intercepted(modules):
        return "a module has a hook or another forward"
    if not all_plain(tensors_of(modules)):
        return "some weights are no plain tensors"
    return None


def _why_not_known(model: Any) -> str | None:
    config, backbone = model.config, model.backbone
    if not is_ours(backbone):
        return "the backbone has a hook or another forward"
    layers = list(backbone.layers)
    if not layers or len(layers) != config.num_hidden_layers:
        return f"{len(layers)} layers, and the configuration has {config.num_hidden_layers}"
    for i, block in enumerate(layers):
        if type(block) is not MambaBlock:
            return f"layer {i} is a {type(block).__name__}, no MambaBlock"
        m = block.mixer
        if (reason := _why_not_mixer(m, i)) is not None:
            return f"layer {i}: {reason}"
        if m.act is not None:
            return f"layer {i} has the activation {config.hidden_act}, not silu"
        if m.mixer_rms_eps != layers[0].mixer.mixer_rms_eps:
            return f"layer {i} normalises dt, B and C otherwise than layer 0"
        if any(type(norm) is not MixerNorm or norm.eps != m.mixer_rms_eps for norm in m.norms()):
            return f"layer {i}: its norms of dt, B and C are of other classes, or have another epsilon"
        if not block.residual_in_fp32 or not _is_plain_norm(block.norm, config):
            return f"layer {i} has another norm, or a residual stream that is not float32"
        if type(m.dt_proj) is not TimeStepProjection or any(
            type(linear) not in _LINEAR for linear in (m.in_proj, m.x_proj, m.out_proj)
        ):
            return f"layer {i} has projections of other classes (adapters, for instance)"
    if not config.residual_in_fp32:
        return "residual_in_fp32 is off"
    if not 2 <= config.conv_kernel <= 8:
        return f"conv_kernel is {config.conv_kernel}; the kernels serve 2 to 8"
    if type(backbone.embeddings) is not nn.Embedding or not _is_plain_norm(backbone.norm_f, config):
        return "the embeddings or the last norm are of other classes"
    if type(model.lm_head) not in _LINEAR or model.lm_head.bias is not None:
        return "the head is of another class, or has a bias"
    return None


def _why_not_mixer(mixer: Any, index: int) -> str | None:
    """Why this is not the Mamba-1 mixer that layer ``index`` was built with."""
    if type(mixer) is not MambaMixer:
        return f"its mixer is a {type(mixer).__name__}, no MambaMixer"
    if type(mixer.conv1d) is not nn.Conv1d:
        return f"its convolution is a {type(mixer.conv1d).__name__}"
    if not (is_causal(mixer.conv1d, 0) and mixer.conv1d.groups == mixer.conv1d.in_channels):
        return f"its convolution is {mixer.conv1d}, which is not causal or not of each channel"
    if mixer.layer_idx != index:
        return f"its mixer is layer {mixer.layer_idx}'s"
    if mixer.causal_conv1d is not causal_conv1d or mixer.selective_scan is not selective_scan:
        return "its mixer calls other ops"
    return None


def _is_plain_norm(norm: nn.Module, config: Any) -> bool:
    return type(norm) is RMSNorm and norm.eps == config.layer_norm_epsilon


def dtype_of_states(model: Any) -> str | None:
    """The dtype of SSM states where it is not the default float32."""
    kind = getattr(model.config, "ssm_state_dtype", None)
    return None if kind in (None, "float32") else kind


def mixer_eps(model: Any) -> float | None:
    """Of the norms of dt, B and C in every layer; None where there are none."""
    eps: float | None = model.backbone.layers[0].mixer.mixer_rms_eps
    return eps


def weight_kinds(model: Any) -> set[Any]:
    """The kinds of the large weights: dtypes, or (format, group) of packed ones."""

    def kind(linear: Any) -> Any:
        return (linear.format, linear.group) if type(linear) is QuantizedLinear else linear.weight.dtype

    linears = [model.lm_head]
    for block in model.backbone.layers:
        linears += [block.mixer.in_proj, block.mixer.x_proj, block.mixer.out_proj]
    return set(map(kind, linears))


def dtype_names(dtypes: Any) -> str:
    """For messages: "float32, bfloat16"."""
    return ", ".join(str(d).removeprefix("torch.") if isinstance(d, torch.dtype) else str(d) for d in dtypes)
