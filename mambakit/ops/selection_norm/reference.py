"""The norms of dt, B and C in float64: the oracle of the tests. Zhang & Sennrich 2019, arXiv 1910.07467."""

from __future__ import annotations

import torch

from mambakit.ops.rms_norm.reference import rms_norm


def selection_norm(selected, rank, eps, dt_weight=None, B_weight=None, C_weight=None):
    """(..., r + 2 n) float64: each of dt, B and C by equation 4, eps under the root."""
    n = (selected.shape[-1] - rank) // 2
    parts = selected.split([rank, n, n], -1)
    return torch.cat([rms_norm(t, w, eps)[0] for t, w in zip(parts, (dt_weight, B_weight, C_weight), strict=True)], -1)
