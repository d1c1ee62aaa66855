"""Token-by-token float64 oracles, written from the paper's equations and independent of the library's references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """One token at a time, float64, differentiable by autograd."""
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.double()
    if delta_softplus:
        delta = F.softplus(delta)
    b, _, d = u.shape
    h = u.new_zeros(b, d, A.shape[1]) if initial_state is None else initial_state.double()
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else u
    if D is not None:
        y = y + D.double() * u
    if z is not None:
        y = y * F.silu(z.double())
    return y, h


def conv_oracle(x, weight, bias=None, activation="silu", initial_state=None):
    """One output at a time, float64."""
    x, weight = x.double(), weight.double()
    b, length, d = x.shape
    k = weight.shape[1]
    state = x.new_zeros(b, d, k - 1) if initial_state is None else initial_state.double()
    row = torch.cat([state.transpose(1, 2), x], 1)
    ys = [(row[:, t : t + k] * weight.T).sum(1) for t in range(length)]
    y = torch.stack(ys, 1) if ys else x
    if bias is not None:
        y = y + bias.double()
    if activation == "silu":
        y = F.silu(y)
    return y, row[:, length:].transpose(1, 2)


def norm_oracle(x, weight=None, eps=1e-5, residual=None):
    total = x.double() if residual is None else x.double() + residual.double()
    y = total / torch.sqrt(total.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.double()), total


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, 0 for two empty or zero tensors; NaN never passes a comparison."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error if scale == 0 else error / scale


def in_16_bits(x: Tensor, group: int) -> Tensor:
    """x (..., in) as the CPU's int8 and int4 products take it: integers up to 32767 times a scale per group; float64."""
    columns = x.shape[-1]
    padded = F.pad(x.double(), (0, -columns % group)).unflatten(-1, (-1, group))
    scales = padded.abs().amax(-1, keepdim=True) / 32767
    return (torch.round(padded / scales.where(scales > 0, 1)) * scales).flatten(-2)[..., :columns]
