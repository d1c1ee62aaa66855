"""RMSNorm with the residual addition fused, in plain PyTorch (Zhang & Sennrich 2019, arXiv 1910.07467).

residual_t = x_t + residual_t ;  y_t = weight * residual_t / sqrt(mean(residual_t^2) + eps)
"""

from __future__ import annotations

import torch


def _compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def forward(x, weight, residual, eps, residual_dtype, out_dtype):
    """`mambakit::rms_norm`: (y, residual)."""
    dtype = _compute_dtype(x.dtype, residual_dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    kept = total.to(residual_dtype)
    total = kept.to(dtype)  # normalise what is kept: the gradient sees nothing else
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    return y.to(out_dtype), kept.clone() if kept is x else kept


def backward(dy, dresidual_out, residual_out, weight, eps, x_dtype, has_residual):
    """`mambakit::rms_norm_backward`: (dx, dweight, dresidual)."""
    dtype = _compute_dtype(residual_out.dtype)
    total = residual_out.to(dtype)
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    normed = total * inverse
    dy = dy.to(dtype)
    scaled = dy if weight is None else dy * weight.to(dtype)
    grad = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if dresidual_out is not None:
        grad = grad + dresidual_out.to(dtype)
    h = total.shape[-1]
    dweight = total.new_empty(0) if weight is None else (dy * normed).reshape(-1, h).sum(0).to(weight.dtype)
    dx = grad.to(x_dtype)
    dresidual = grad.to(residual_out.dtype) if has_residual else residual_out.new_empty(0)
    return dx, dweight, dresidual.clone() if dresidual.data_ptr() == dx.data_ptr() else dresidual
