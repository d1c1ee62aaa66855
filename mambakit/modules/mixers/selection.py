"""What a Mamba layer chose to let in, to keep and to read at each token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Selection(NamedTuple):
    """What a layer's scan was given for l tokens of b rows (arXiv 2312.00752, algorithm 2), in float32 or float64."""

    u: Tensor
    """(b, l, d), the convolution's output."""
    delta: Tensor
    """(b, l, d), the step sizes, after the softplus."""
    A: Tensor
    """(d, n), negative."""
    B: Tensor
    """(b, l, n)."""
    C: Tensor
    """(b, l, n)."""
    D: Tensor
    """(d,)."""
