"""The public fused mixer: contract, and the one entry to `mambakit::fused_mixer`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops.fused_mixer import schema  # noqa: F401, defines the op
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL


class MixerWeights(NamedTuple):
    """What lies between a layer's projections: (d, k), (d,), (r + 2 n, d), (d, r), (d, n), (d,), (d,), and of the norms
    of dt, B and C (r,), (n,), (n,), or none."""

    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None


def fused_mixer(
    xz: Tensor, weights: MixerWeights, conv_state: Tensor | None = None, ssm_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, recompute: bool = False, mixer_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolution with SiLU, selection and scan (arXiv 2312.00752, figure 3 and algorithm 2), for training.

    Left to autograd, the gradients of x and z would be concatenated, the two that the convolution's output has would be
    added, and those of float32 weights under autocast rounded to half before they are widened. Here the gradients of x
    and z are written into the halves of one tensor, the product of x_proj's gradient is added inside the matrix
    product, and weights' gradients are written in the weights' dtype. The arithmetic is otherwise that of the ops one
    by one.

    Args:
        xz: (b, l, 2 d), in_proj's output.
        conv_state, ssm_state: (b, d, k - 1) and (b, d, n), before the first token; zeros when absent. (s, ...) when
            packed.
        cu_seqlens: (s + 1,) int32 of a packed row.
        recompute: do not keep the convolution's output and delta, (b, l, d) each, for the backward pass: compute them
            again.
        mixer_eps: of the norms of dt, B and C (`mambakit.ops.selection_norm`), with the weights that are given or
            without; None: there are no norms.

    Returns:
        (b, l, d) in the dtype of ``xz``, and both states after the last token. Differentiable in and through all of
        them; a second derivative raises.

    Raises:
        ValueError: shapes that do not fit, cu_seqlens of more than one row, weights of norms without ``mixer_eps`` or
            some of them without the others.
    """
    op = "fused_mixer"
    d = weights.conv.shape[0]
    _checks.require(xz.dim() == 3, f"{op}: xz has shape {tuple(xz.shape)}, expected (b, l, 2 d)")
    _checks.shape(op, "xz", xz, (*xz.shape[:2], 2 * d), "(b, l, 2 d)")
    norms = [t is not None for t in (weights.dt_norm, weights.B_norm, weights.C_norm)]
    _checks.require(
        all(norms) or not any(norms), f"{op}: some of the norms of dt, B and C have weights; give all three or none"
    )
    _checks.require(
        mixer_eps is not None or not any(norms), f"{op}: the norms of dt, B and C have weights, but no mixer_eps"
    )
    if cu_seqlens is not None:
        _checks.cu_seqlens(op, cu_seqlens, xz.shape[0], xz.shape[1])
    differentiable = (xz, *weights, conv_state, ssm_state)
    _checks.no_forward_mode(op, *differentiable)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    return torch.ops.mambakit.fused_mixer(
        xz, *weights, conv_state, ssm_state, cu_seqlens, recompute, CHECKPOINT_INTERVAL if needs_grad else 0, mixer_eps
    )[:3]
