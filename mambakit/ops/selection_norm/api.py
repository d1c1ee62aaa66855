"""The public norm of dt, B and C: contract, checks, and the one entry to `mambakit::selection_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import _checks
from mambakit.ops._backends.memory import in_functorch
from mambakit.ops.selection_norm import (
    chunked,
    schema,  # noqa: F401, defines the op
)


def selection_norm(
    selected: Tensor,
    rank: int,
    eps: float,
    dt_weight: Tensor | None = None,
    B_weight: Tensor | None = None,
    C_weight: Tensor | None = None,
) -> Tensor:
    """RMS norms (arXiv 1910.07467) of the time steps' dt, of B and of C, each over its own channels.

    FalconMamba (arXiv 2410.05355) has them without weights, Jamba (arXiv 2403.19887) with weights.

    Args:
        selected: (..., r + 2 n), x_proj's output: dt, B and C side by side. Any floating dtype.
        rank: r.
        eps: added to the mean square.
        dt_weight, B_weight, C_weight: (r,), (n,) and (n,), all three or none.

    Returns:
        (..., r + 2 n) in the dtype of ``selected``: weight * t / sqrt(mean(t^2) + eps) of each of the three.

    Differentiable once in ``selected`` and the weights. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices that do not fit, or some of the weights without the others. TypeError: a dtype
            that is not floating.
    """
    op = "selection_norm"
    _checks.require(selected.dim() >= 1, f"{op}: selected has no dimensions, expected (..., r + 2 n)")
    _checks.dtype(op, "selected", selected, _checks.FLOATING)
    width = selected.shape[-1]
    _checks.require(
        0 < rank < width and (width - rank) % 2 == 0,
        f"{op}: {width} channels and rank {rank}; expected r + 2 n channels with r, n of 1 or more",
    )
    weights = {"dt_weight": dt_weight, "B_weight": B_weight, "C_weight": C_weight}
    present = [name for name, w in weights.items() if w is not None]
    _checks.require(len(present) in (0, 3), f"{op}: {', '.join(present)} without the others; give all three or none")
    n = (width - rank) // 2
    for (name, weight), size, letters in zip(weights.items(), (rank, n, n), ("(r,)", "(n,)", "(n,)"), strict=True):
        if weight is not None:
            _checks.shape(op, name, weight, (size,), letters)
            _checks.dtype(op, name, weight, _checks.FLOATING)
    _checks.same_device(op, selected.device, **weights)
    _checks.no_forward_mode(op, selected, *weights.values())
    if in_functorch():
        return chunked.forward(selected, dt_weight, B_weight, C_weight, rank, eps)
    return torch.ops.mambakit.selection_norm(selected, dt_weight, B_weight, C_weight, rank, eps)
