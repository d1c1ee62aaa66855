"""The norms of dt, B and C in plain PyTorch: any device, any dtype."""

from __future__ import annotations

import torch


def split(selected, rank):
    """dt (..., r), B and C (..., n)."""
    n = (selected.shape[-1] - rank) // 2
    return selected.split([rank, n, n], -1)


def forward(selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm`."""
    wide = torch.float64 if selected.dtype == torch.float64 else torch.float32
    parts = []
    for t, weight in zip(split(selected.to(wide), rank), (dt_weight, B_weight, C_weight), strict=True):
        y = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
        parts.append(y if weight is None else y * weight.to(wide))
    return torch.cat(parts, -1).to(selected.dtype)


def backward(dy, selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm_backward`: the gradients of selected and of the weights."""
    wide = torch.float64 if selected.dtype == torch.float64 else torch.float32
    gradients, dweights = [], []
    weights = dt_weight, B_weight, C_weight
    for t, dt, weight in zip(split(selected.to(wide), rank), split(dy.to(wide), rank), weights, strict=True):
        inverse = torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
        normed = t * inverse
        scaled = dt if weight is None else dt * weight.to(wide)
        gradients.append(inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)))
        dweights.append(
            t.new_empty(0) if weight is None else (dt * normed).reshape(-1, t.shape[-1]).sum(0).to(weight.dtype)
        )
    return torch.cat(gradients, -1).to(selected.dtype), *dweights
