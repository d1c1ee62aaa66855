"""mamba_ssm's norms: RMSNorm and LayerNorm of a sum, with dropout, parallel branches and row scales.

The two modules of upstream's history, ``layer_norm`` and the older ``layernorm``, order their arguments differently;
both are here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.compat.forms import parameter_dtype, require
from mambakit.ops import rms_norm


class RMSNorm(nn.Module):
    """mamba_ssm's RMSNorm: a weight (hidden_size,), ``bias`` None, and the residual addition in the same call."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was pickled whole by releases up to 1.2 has no dropout."""
        super().__setstate__(state)
        if "drop" not in self._modules:
            self.__dict__.setdefault("drop", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, None, residual=residual, eps=self.eps, dropout_p=dropout, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def layer_norm_fn(
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
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """The norm of ``dropout(x * rowscale) + dropout(x1) + residual``.

    Args:
        x, x1, residual: (..., h). weight, bias, weight1, bias1: (h,). rowscale: (...), not with ``x1``.
        weight1: a second weight, for a second output of the same sum.
        prenorm: also return the sum, in residual's dtype, else float32 where ``residual_in_fp32``, else x's.
        return_dropout_mask: also return the masks of x and of x1 (True: kept; None without dropout).

    Returns:
        y in x's dtype; with ``weight1``, ``prenorm`` or ``return_dropout_mask`` a tuple (y, [y1], [sum], [masks]).
        Arithmetic is float32 (float64 in float64).
    """
    plain = x1 is weight1 is rowscale is bias is None and dropout_p == 0
    if residual is not None:
        require(
            residual.shape == x.shape,
            f"layer_norm_fn: residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}",
        )
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if plain and is_rms_norm:
        y, total = rms_norm(x, weight, eps, residual=residual, residual_dtype=stream)
        outputs = [y]
    else:
        total, masks = _sum(x, residual, x1, dropout_p, rowscale)
        outputs = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
        if weight1 is not None:
            outputs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
        total = total.to(stream)
    found = [*outputs, *([total] if prenorm else []), *(masks if return_dropout_mask else ())]
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(
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
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with the root mean square in place of mean and variance."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def _sum(x, residual, x1, dropout_p, rowscale) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    op = "layer_norm_fn"
    require(x1 is None or rowscale is None, f"{op}: rowscale does not go with x1; scale the rows before")
    require(0 <= dropout_p <= 1, f"{op}: dropout_p is {dropout_p}; it must be from 0 to 1")
    for name, value, expected in (("x1", x1, x.shape), ("rowscale", rowscale, x.shape[:-1])):
        require(
            value is None or value.shape == expected,
            f"{op}: {name} has shape {None if value is None else tuple(value.shape)}, expected {tuple(expected)}",
        )
    dtype = parameter_dtype(x.dtype)
    branches = [x.to(dtype) if rowscale is None else x.to(dtype) * rowscale[..., None].to(dtype)]
    if x1 is not None:
        branches.append(x1.to(dtype))
    masks: list[Tensor | None] = [None, None]
    if dropout_p > 0:
        for i, branch in enumerate(branches):
            kept = torch.rand(branch.shape, device=x.device, dtype=torch.float32) > dropout_p
            branches[i], masks[i] = branch * kept * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), kept
    if residual is not None:
        branches.append(residual.to(dtype))
    return sum(branches[1:], branches[0]), (masks[0], masks[1])


def _norm(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    for name, value in (("weight", weight), ("bias", bias)):
        require(
            value is None or value.shape == total.shape[-1:],
            f"layer_norm_fn: {name} has shape {None if value is None else tuple(value.shape)}, expected (h,) = "
            f"{tuple(total.shape[-1:])}",
        )
    weight = weight.to(total.dtype)
    bias = None if bias is None else bias.to(total.dtype)
    if not is_rms_norm:
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    y, _ = rms_norm(total, weight, eps)
    return y if bias is None else y + bias


class LayerNormFn:
    """mamba_ssm's autograd function, of which callers use ``apply``."""

    apply = staticmethod(layer_norm_fn)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer of `layer_norm_fn`'s output, and with ``prenorm`` the sum before the norm."""
    y, total = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


def normalized_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """mamba_ssm's private ``_layer_norm_fwd``, which its interface and other packages import.

    Args:
        x: (rows, h). The others as in `layer_norm_fn`.

    Returns:
        y, y of ``weight1``, the means (None for an RMS norm), the reciprocal deviations, the sum, the seeds of dropout
        (None: the masks are kept), and both masks.
    """
    total, masks = _sum(x, residual, x1, dropout_p, rowscale)
    y, y1 = (
        None if w is None else _norm(total, w, b, eps, is_rms_norm).to(out_dtype or x.dtype)
        for w, b in ((weight, bias), (weight1, bias1))
    )
    mean = None if is_rms_norm else total.mean(-1)
    variance = total.square().mean(-1) if mean is None else total.var(-1, unbiased=False)
    stream = residual.dtype if residual is not None else residual_dtype or x.dtype
    kept = masks if return_dropout_mask else (None, None)
    return y, y1, mean, torch.rsqrt(variance + eps), total.to(stream), None, *kept


def old_layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """`layer_norm_fn` with the arguments of releases up to 1.2 (module ``layernorm``)."""
    return layer_norm_fn(
        x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm
    )


def old_rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """`rms_norm_fn` with the arguments of releases up to 1.2 (module ``layernorm``)."""
    return old_layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)
