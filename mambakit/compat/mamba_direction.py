"""One direction of a `Mamba` layer: the convolution, selection, scan and gate between its two projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.compat.forms import parameter_dtype
from mambakit.compat.replaced import LAYER
from mambakit.modules.interception import is_filter, untouched
from mambakit.ops import causal_conv1d, selective_scan
from mambakit.ops._backends.memory import all_plain, transformed
from mambakit.ops.fused_mixer import MixerWeights, mix_rows


class Direction:
    """The layers and parameters of one direction, as they are at this call: whatever is replaced or hooked is called.

    Args:
        layer: a `Mamba`.
        suffix: what the names of the direction's parameters end in: "", "_b" or "_s".
    """

    __slots__ = ("A_log", "D", "act", "conv", "dt_proj", "x_proj")

    def __init__(self, layer: Any, suffix: str = ""):
        self.conv, self.x_proj = getattr(layer, f"conv1d{suffix}"), getattr(layer, f"x_proj{suffix}")
        self.dt_proj = getattr(layer, f"dt_proj{suffix}")
        self.A_log, self.D = getattr(layer, f"A{suffix}_log"), getattr(layer, f"D{suffix}")
        self.act = layer.act

    def can_fuse(self) -> bool:
        """Whether it may run as one op: nothing is replaced, hooked or traced."""
        if LAYER:
            return False
        conv, x_proj, dt_proj = self.conv, self.x_proj, self.dt_proj
        return (
            self.can_convolve() and untouched(x_proj, nn.Linear) and untouched(dt_proj, nn.Linear)
            and dt_proj.bias is not None and x_proj.bias is None and not transformed()
            and all_plain((conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias))
        )  # fmt: skip

    def can_convolve(self) -> bool:
        """Whether the convolution and its activation may run as one op."""
        conv = self.conv
        return untouched(self.act, nn.SiLU) and type(conv) is nn.Conv1d and is_filter(conv, conv.kernel_size[0] - 1)

    def __call__(self, xz: Tensor, states: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(b, l, 2 d) -> (b, l, d); the states after it are written to ``states``, (b, d, k) and (b, d, n)."""
        if states is None and self.can_fuse():
            return mix_rows(xz, self._weights(xz))
        x, z = xz.chunk(2, -1)
        u, delta, B, C, bias = self.selected(self.convolved(x))
        y, last = self.scanned(u, delta, decay(self.A_log), B, C, z, bias, states is not None)
        if states is not None and last is not None:
            conv_state, ssm_state = states
            k, length = conv_state.shape[-1], x.shape[1]
            conv_state.copy_(F.pad(x.transpose(1, 2), (k - length, 0)))  # the last k inputs, after zeros
            ssm_state.copy_(last)
        return y

    def both_ways(self, xz: Tensor, backwards: Tensor) -> Tensor:
        """Vim's first form: the same selection, scanned forwards and backwards, with an A for each.

        Args:
            xz: (b, l, 2 d). backwards: the log of the second A, (d, n).
        """
        x, z = xz.chunk(2, -1)
        u, delta, B, C, bias = self.selected(self.convolved(x))
        forth, _ = self.scanned(u, delta, decay(self.A_log), B, C, z, bias)
        u, delta, B, C, z = (t.flip(1) for t in (u, delta, B, C, z))
        back, _ = self.scanned(u, delta, decay(backwards), B, C, z, bias)
        return forth + back.flip(1)

    def _weights(self, xz: Tensor) -> MixerWeights:
        conv, dt_proj, dtype = self.conv, self.dt_proj, parameter_dtype(xz.dtype)
        A_log, D, bias = self.A_log.to(dtype), self.D.to(dtype), dt_proj.bias.to(dtype)
        return MixerWeights(conv.weight.squeeze(1), conv.bias, self.x_proj.weight, dt_proj.weight, A_log, D, bias)

    def convolved(self, x: Tensor) -> Tensor:
        """(b, l, d), through the activation."""
        conv = self.conv
        function = LAYER.get("causal_conv1d_fn", causal_conv1d)
        if function is not None and self.can_convolve():
            weight = conv.weight.squeeze(1)
            if function is causal_conv1d:
                return causal_conv1d(x, weight, conv.bias, "silu")[0]
            return function(x=x.transpose(1, 2), weight=weight, bias=conv.bias, activation="silu").transpose(1, 2)
        return self.act(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The scan's u, delta, B, C, and the bias that it adds to delta: none where dt_proj's call has added it."""
        dt_proj, n = self.dt_proj, self.A_log.shape[1]
        of_input = self.x_proj(x)
        dt, B, C = of_input.split([of_input.shape[-1] - 2 * n, n, n], -1)
        if untouched(dt_proj, nn.Linear):
            return x, F.linear(dt, dt_proj.weight), B, C, dt_proj.bias
        return x, dt_proj(dt), B, C, None

    def scanned(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, bias: Tensor | None,
        with_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The scan's output (b, l, d), and with ``with_state`` the last state; by upstream's name where it is replaced,
        with the arguments that upstream's layer passes."""
        function = LAYER.get("selective_scan_fn")
        if function is None:
            return selective_scan(u, delta, A, B, C, self.D, z, bias, True)
        u, delta, B, C, z = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z))
        bias = None if bias is None else bias.to(parameter_dtype(bias.dtype))
        found = function(
            u, delta, A, B, C, self.D.to(parameter_dtype(self.D.dtype)), z=z, delta_bias=bias, delta_softplus=True,
            return_last_state=with_state,
        )  # fmt: skip
        y, last = found if with_state else (found, None)
        return y.transpose(1, 2), last


def decay(A_log: Tensor) -> Tensor:
    """A in float32 (float64) whatever the parameter was cast to."""
    return -torch.exp(A_log.to(parameter_dtype(A_log.dtype)))
