"""mamba_ssm's reference norms: plain PyTorch, in the dtype of their input unless asked otherwise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.compat.forms import parameter_dtype


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """LayerNorm of a sum in plain PyTorch, in x's dtype unless ``upcast``; arguments as in `layer_norm_fn`."""
    return _reference(
        False, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask,
        dropout_mask1, upcast,
    )  # fmt: skip


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """RMSNorm of a sum in plain PyTorch, in x's dtype unless ``upcast``; arguments as in `layer_norm_fn`."""
    return _reference(
        True, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask,
        dropout_mask1, upcast,
    )  # fmt: skip


def _reference(
    is_rms_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, mask, mask1, upcast
) -> Any:
    dtype = x.dtype
    wide = parameter_dtype(dtype) if upcast else dtype

    def dropped(t: Tensor, mask: Tensor | None) -> Tensor:
        if dropout_p == 0:
            return t
        return F.dropout(t, dropout_p) if mask is None else t.masked_fill(~mask, 0) / (1 - dropout_p)

    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale[..., None]
    total = dropped(total, mask)
    if x1 is not None:
        total = total + dropped(x1.to(wide), mask1)
    if residual is not None:
        total = (total + residual).to(wide)

    def norm(w: Tensor, b: Tensor | None) -> Tensor:
        if upcast:
            w, b = w.to(wide), None if b is None else b.to(wide)
        if not is_rms_norm:
            return F.layer_norm(total.to(w.dtype), total.shape[-1:], w, b, eps).to(dtype)
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * w
        return (y if b is None else y + b).to(dtype)

    found = [norm(weight, bias), *([] if weight1 is None else [norm(weight1, bias1)]), *([total] if prenorm else [])]
    return found[0] if len(found) == 1 else tuple(found)
