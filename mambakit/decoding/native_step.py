"""Decoding on a CPU: one token for each row in one call into the native library, for every 16 rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.decoding.eligibility import (
    dtype_names,
    dtype_of_states,
    mixer_eps,
    skipped_modules,
    tensors_of,
    why_not_by_weights,
)
from mambakit.modules import MambaCache
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops._backends import native
from mambakit.ops._backends.memory import all_plain
from mambakit.ops.decode.cpu import DecodeStep
from mambakit.ops.decode.cpu_parts import DecodeParts
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import MOST_ROWS
from mambakit.ops.linear.cpu import KINDS
from mambakit.ops.linear.packed import PackedWeight

_DTYPES = (torch.float32, torch.bfloat16)
# Of weights in float32 torch's product is faster beyond so many rows, of others at none (Xeon, 2 threads: at 64 rows
# 0.83 times the forward's tokens in float32, 1.9 in bfloat16).
_MOST_FLOAT32_ROWS = 32


def why_not(model: Any, rows: int, *, states: Any = None, called: bool = False) -> str | None:
    """Why `NativeDecoder` cannot decode ``rows`` rows of this model, or None where it can.

    Args:
        states: the cache to decode; None: one made by `new_cache` of the model's backbone.
        called: whether this is asked inside the model's own forward, whose hooks have run already.
    """
    if model.device.type != "cpu":
        return f"the model is on {model.device}; the native library computes on a CPU"
    if not native.is_available():
        return "there is no native library (`mambakit env` says why)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if rows < 1:
        return f"{rows} rows; it serves 1 or more"
    if (reason := why_not_by_weights(model, called)) is not None:
        return reason
    tensors = tensors_of(skipped_modules(model, called))
    if any(t.device.type != "cpu" for t in tensors):
        return "some weights are not on the CPU"
    dtypes = {model.dtype, *(t.dtype for t in tensors if t.dtype.is_floating_point)}
    if not dtypes <= set(_DTYPES):
        return f"weights of {dtype_names(dtypes)}; it reads {dtype_names(_DTYPES)}"
    if rows > _MOST_FLOAT32_ROWS and any(
        type(m) is nn.Linear and m.weight.dtype == torch.float32 for m in skipped_modules(model, called)
    ):
        return f"{rows} rows of float32 weights; of those it serves 1 to {_MOST_FLOAT32_ROWS}"
    formats = {m.format for m in skipped_modules(model, called) if isinstance(m, QuantizedLinear)}
    if not formats <= KINDS.keys():
        return f"weights in {', '.join(sorted(formats - KINDS.keys()))}; it reads {', '.join(KINDS)}"
    if (kind := dtype_of_states(model)) is not None:
        return f"states of {kind} (ssm_state_dtype); it reads float32"
    if states is not None and not fits(states):
        return "states of another dtype or device, or of other layers; it reads a cache as the model makes one"
    return None


def fits(states: Any) -> bool:
    """Whether the kernels can use these states in place."""
    if not isinstance(states, MambaCache) or states.dtype not in _DTYPES:
        return False
    if states.ssm_states.dtype != torch.float32:
        return False
    return states.device.type == "cpu" and all_plain((states.conv_states, states.ssm_states))


def native_weights(model: Any) -> tuple[list[PackedLayer], PackedWeight]:
    """The layers and the head as the native library reads them: the weights, not copies. Only A is a new tensor."""
    format = str(model.dtype).removeprefix("torch.")

    def packed(linear: Any) -> PackedWeight:
        return linear.packed if isinstance(linear, QuantizedLinear) else pack(linear.weight, format)

    layers = [
        PackedLayer(
            norm=block.norm.weight, in_proj=packed(m.in_proj), in_proj_bias=m.in_proj.bias,
            conv=m.conv1d.weight.squeeze(1), conv_bias=m.conv1d.bias, x_proj=packed(m.x_proj),
            dt_proj=packed(m.dt_proj), dt_bias=m.dt_proj.bias, A=-torch.exp(m.A_log), D=m.D,
            out_proj=packed(m.out_proj), out_proj_bias=m.out_proj.bias,
            dt_norm=norms[0], B_norm=norms[1], C_norm=norms[2],
        )
        for block in model.backbone.layers for m in [block.mixer] for norms in [m.norm_weights()]
    ]  # fmt: skip
    return layers, packed(model.lm_head)


class NativeDecoder:
    """A `mambakit.decoding.registry.Decoder`. A row's bits do not depend on the other rows."""

    capacity = 0

    def __init__(self, model: Any, states: Any):
        layers, head = native_weights(model)
        self.states = states
        self.logits: Tensor | None = None
        self._embeddings = model.backbone.embeddings
        given = (
            layers, model.backbone.norm_f.weight, head, model.config.layer_norm_epsilon,
            states.conv_states, states.ssm_states, mixer_eps(model),
        )  # fmt: skip
        self._run = DecodeStep(*given) if states.max_batch_size <= MOST_ROWS else DecodeParts(*given)

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._run(self._embeddings(tokens))
        self.states.advance(1)
        self.logits = logits
        return logits
