"""The Mamba layer with selection switched off: Delta, B and C no longer depend on the input, and nothing else changes.

Time-invariant, the recurrence is a convolution with a kernel that can be written down (S4D, arXiv 2206.11893):

    K[d, t] = sum_n C[d, n] Delta[d] exp(Delta[d] A[d, n] t),    y = K * u + D u

so it is computed by FFT, in float32. Each channel has its own C (B is folded into it: only their product counts), which
is at least as rich as what the selective layer gets at one token, where B and C are shared between channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import MambaForCausalLM, MambaMixer
from mambakit.ops import causal_conv1d


class TimeInvariantMixer(nn.Module):
    """Takes over a `MambaMixer`'s projections, convolution, A, D and initial time steps; x_proj and dt_proj go.

    ``C`` (d, n) starts from N(0, 1). Trains only: there is no cache, and no packing.
    """

    def __init__(self, mixer: MambaMixer):
        super().__init__()
        self.in_proj, self.conv1d, self.out_proj = mixer.in_proj, mixer.conv1d, mixer.out_proj
        self.A_log, self.D = mixer.A_log, mixer.D
        self.delta_bias = nn.Parameter(mixer.dt_proj.bias.detach().clone())  # (d,), before the softplus
        self.C = nn.Parameter(torch.randn_like(mixer.A_log))

    def kernel(self, length: int) -> Tensor:
        """(d, length) float32."""
        delta = F.softplus(self.delta_bias)[:, None]  # (d, 1)
        rate = -torch.exp(self.A_log) * delta  # (d, n)
        time = torch.arange(length, device=rate.device, dtype=torch.float32)
        # A sum, not a product of matrices, which autocast would round to bfloat16.
        return ((self.C * delta)[:, :, None] * torch.exp(rate[:, :, None] * time)).sum(1)

    def forward(self, hidden_states: Tensor, cache_params: Any = None, packing: Any = None) -> Tensor:
        """(b, l, h) -> (b, l, h)."""
        if cache_params is not None or packing is not None:
            raise ValueError("a time-invariant mixer reads whole rows only; call the model with use_cache=False")
        x, z = self.in_proj(hidden_states).chunk(2, -1)  # (b, l, d) each
        x, _ = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        y = long_convolution(x.float(), self.kernel(x.shape[1])) + self.D.float() * x.float()
        return self.out_proj((y * F.silu(z.float())).to(x.dtype))


def long_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over time of u (b, l, d) with kernel (d, l), both float32."""
    length = u.shape[1]
    size = fast_size(2 * length - 1)  # zero padding: no wrap-around
    product = torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(product, n=size)[..., :length].transpose(1, 2)


def fast_size(least: int) -> int:
    """The smallest even size from ``least`` up with no prime factor above 7, for which FFTs are fast."""
    size = least + least % 2
    while True:
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


def without_selection(model: MambaForCausalLM) -> MambaForCausalLM:
    """``model`` itself with every mixer's selection switched off."""
    for block in model.backbone.layers:
        block.mixer = TimeInvariantMixer(block.mixer)
    return model
