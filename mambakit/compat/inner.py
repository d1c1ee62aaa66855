"""mamba_ssm's inner functions: what lies between a mixer's projections, as one call.

Gradients are autograd's of the ops, so every argument has its own: out_proj's bias, the norms' weights, and z of both
directions of `bimamba_inner_fn`, which upstream's hand-written backward passes get wrong or leave out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.compat.forms import as_complex, grouped, require, require_tensors
from mambakit.modules.mixers.fused_layer import on_gpu
from mambakit.ops import causal_conv1d, rms_norm, selective_scan
from mambakit.ops.fused_mixer import LayerWeights, fused_layer


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolution, selection, scan, gate and output projection (arXiv 2312.00752, figure 3 and algorithm 2).

    Args:
        xz: (b, 2 d, l), in_proj's output.
        conv1d_weight: (d, 1, k); conv1d_bias: (d,).
        x_proj_weight: (r + 2 n, d); delta_proj_weight: (d, r).
        out_proj_weight: (h, d); out_proj_bias: (h,).
        A: (d, n). B, C: None where they are selected by the input, else as in `selective_scan_fn`.
        D, delta_bias: (d,). B_proj_bias, C_proj_bias: (n,).
        b_rms_weight, c_rms_weight: (n,); dt_rms_weight: (d,). RMS norms of B, of C, and of delta after its projection,
            as upstream has it. transformers' FalconMamba normalises before that projection where it computes without
            this function, and its logits differ by per cents between the two.
        checkpoint_lvl: 0 or 1, how much upstream computes again in its backward pass. The result does not depend on it.

    Returns:
        (b, l, h).
    """
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight)
    if delta_softplus and all(t is None for t in (B, C, B_proj_bias, C_proj_bias, *norms)):
        found = _planned(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, D, delta_bias, out_proj_weight,
            out_proj_bias,
        )  # fmt: skip
        if found is not None:
            return found
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, norms, b_c_dt_rms_eps,
    )  # fmt: skip
    return _projected(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """`mamba_inner_fn` without the output projection (Vim's): (b, d, l)."""
    y = None
    if delta_softplus and all(t is None for t in (B, C, B_proj_bias, C_proj_bias)):
        y = _planned(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, D, delta_bias)
    if y is None:
        y = _inner(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
            C_proj_bias, delta_softplus, checkpoint_lvl,
        )  # fmt: skip
    return y.transpose(1, 2).contiguous()


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """`mamba_inner_fn` with a second scan, backwards over the same selection with ``A_b`` (Vim's first form).

    Vim's own backward pass gives z half its gradient; this one gives the whole.
    """
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, backwards=A_b,
    )  # fmt: skip
    return _projected(y, out_proj_weight, out_proj_bias)


def _planned(
    xz, conv_weight, conv_bias, x_proj, delta_proj, A, D, delta_bias, out_proj=None, out_bias=None
) -> Tensor | None:  # fmt: skip
    """The usual form on a GPU as one function over launches that are prepared once for a shape, or None."""
    if D is None or delta_bias is None or A.is_complex() or xz.dim() != 3 or not on_gpu(xz):
        return None
    weights = LayerWeights(
        None, None, None, conv_weight, conv_bias, x_proj, delta_proj, delta_bias, A, D, out_proj, out_bias
    )
    found = fused_layer(xz.transpose(1, 2).contiguous(), None, weights, log=False)
    return None if found is None else found[0]


def _inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
    delta_softplus, checkpoint_lvl, norms=(None, None, None), eps=1e-6, backwards=None,
) -> Tensor:  # fmt: skip
    """(b, l, d)"""
    op = "mamba_inner_fn"
    require(checkpoint_lvl in (0, 1), f"{op}: checkpoint_lvl is {checkpoint_lvl!r}; it must be 0 or 1")
    require_tensors(
        op, xz=xz, conv1d_weight=conv1d_weight, x_proj_weight=x_proj_weight, delta_proj_weight=delta_proj_weight, A=A
    )
    d, r = delta_proj_weight.shape
    require(
        xz.dim() == 3 and xz.shape[1] == 2 * d,
        f"{op}: xz has shape {tuple(xz.shape)}, expected (b, 2 d, l) with d = {d}, delta_proj_weight's rows",
    )
    (b, _, length), n = xz.shape, A.shape[1]
    # Both are taken from one product, from its two ends: of another size they would overlap, or leave a gap.
    states = n * (2 if A.is_complex() else 1)
    selected = (B is None) + (C is None)
    found, rows = tuple(x_proj_weight.shape), r + states * selected
    require(
        len(found) == 2 and found[1] == d and (found[0] == rows or (selected < 2 and found[0] > rows)),
        f"{op}: x_proj_weight has shape {found}, expected (r + {selected} n, d) = {(rows, d)}, where A has n = {n} "
        f"states and delta_proj_weight r = {r} columns",
    )
    x, z = xz.transpose(1, 2).chunk(2, -1)
    weight = conv1d_weight.squeeze(1) if conv1d_weight.dim() == 3 else conv1d_weight
    x, _ = causal_conv1d(x, weight, conv1d_bias, "silu")
    projected = F.linear(x, x_proj_weight)  # (b, l, r + 2 n), twice that many states where A is complex
    delta = F.linear(projected[..., :r], delta_proj_weight)  # (b, l, d)
    b_norm, c_norm, delta_norm = norms
    B = _selection("B", B, projected[..., r : r + states], B_proj_bias, b_norm, eps, A, (b, d, n, length))
    C = _selection("C", C, projected[..., -states:], C_proj_bias, c_norm, eps, A, (b, d, n, length))
    if delta_norm is not None:
        delta, _ = rms_norm(delta, delta_norm, eps)
    y, _ = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if backwards is None:
        return y
    flipped = (t.flip(1) for t in (x, delta, B, C, z))
    x, delta, B, C, z = flipped
    other, _ = selective_scan(x, delta, backwards, B, C, D, z, delta_bias, delta_softplus)
    return y + other.flip(1)


def _selection(name, given, selected, bias, norm, eps, A, sizes) -> Tensor:
    """B or C as (b, l, n), or (b, l, g, n): the one that is given, or the one that the input selects."""
    if given is not None:
        b, d, n, length = sizes
        return grouped("mamba_inner_fn", name, as_complex(given) if A.is_complex() else given, b, d, n, length)
    if bias is not None:
        selected = selected + bias.to(selected.dtype)
    if norm is not None:
        selected, _ = rms_norm(selected, norm, eps)
    if not A.is_complex():
        return selected
    selected = selected.to(A.real.dtype)
    return torch.complex(selected[..., 0::2], selected[..., 1::2])


def _projected(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out_proj in its weight's dtype, or in autocast's."""
    require(
        weight.dim() == 2 and weight.shape[1] == y.shape[-1],
        f"mamba_inner_fn: out_proj_weight has shape {tuple(weight.shape)}, expected (h, d) with d = {y.shape[-1]}",
    )
    return F.linear(y.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


class MambaInnerFn:
    """mamba_ssm's autograd function, of which callers use ``apply``."""

    apply = staticmethod(mamba_inner_fn)
