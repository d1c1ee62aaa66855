"""RMSNorm in float64, as the paper writes it: the oracle of the tests. Zhang & Sennrich 2019, arXiv 1910.07467."""

from __future__ import annotations

import torch


def rms_norm(x, weight=None, eps=1e-5, residual=None):
    """(y, x + residual), float64: the norm of the sum, and the sum.

    Equation 4 with eps under the root: y_i = weight_i a_i / RMS(a), RMS(a) = sqrt(mean_i a_i^2 + eps).
    """
    a = x.double() if residual is None else x.double() + residual.double()
    y = a / torch.sqrt(a.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.double()), a
