"""Sampling on a CPU, row after row.

PyTorch's elementwise loops compute the last elements of a tensor with other instructions than the rest, which can
change the last bit. Rows are therefore computed one by one, so that a row has the same bits in any batch. Filters are
combined into one threshold on w; only the values near it are sorted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mambakit.ops.sampling.reference import LANES, NO_TOKEN


def sample(logits: Tensor, uniform: Tensor, parameters: Tensor) -> Tensor:
    rows = zip(logits.detach(), uniform.tolist(), parameters.tolist(), strict=True)
    return torch.tensor([_row(*row) for row in rows], dtype=torch.int64, device="cpu")


def _row(logits: Tensor, uniform: float, parameters: list[float]) -> int:
    temperature, top_k, top_p, min_p, typical_p, epsilon = parameters
    best = int(logits.argmax())  # NaN counts as the largest
    largest = float(logits[best])
    if math.isnan(largest) or largest == -math.inf or (largest == math.inf and temperature != 0):
        return NO_TOKEN
    if temperature == 0:
        return best
    logits = logits if logits.dtype == torch.float64 else logits.float()
    s = logits - largest
    w = (s if temperature == 1 else s.div_(temperature)).exp_().numpy()
    cut = 0.0
    if 0 < top_k < len(w):
        cut = float(torch.from_numpy(w).topk(int(top_k), sorted=False).values.min())
    if top_p < 1:
        cut = _nucleus(w, cut, top_p)
    cut = max(cut, min_p)
    if cut > 0:
        w = np.where(w >= cut, w, w.dtype.type(0))
    if typical_p < 1:
        w = _typical(w, typical_p)
    if epsilon > 0:
        enough = min(float(w.max()), epsilon * float(w.sum(dtype=np.float64)))
        w = np.where(w >= enough, w, w.dtype.type(0))
    return _draw(w, uniform)


def _draw(w: np.ndarray, uniform: float) -> int:
    """The first token, lane after lane, at which the sum of w exceeds ``uniform`` times that of all."""
    whole = len(w) // LANES * LANES
    sums = w[:LANES]
    if len(w) > LANES:
        sums = w[:whole].reshape(-1, LANES).sum(0)
        sums[: len(w) - whole] += w[whole:]
    ends = sums.cumsum(dtype=np.float64)
    target = uniform * ends[-1]
    # A target that is rounded up to the total, or to a lane's end, means the last token that has a part in the sum.
    lane = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1], side="left")))
    inside = w[lane::LANES]
    reached = (ends[lane - 1] if lane else 0.0) + inside.cumsum(dtype=np.float64)
    step = min(int(np.searchsorted(reached, target, side="right")), int(np.flatnonzero(inside)[-1]))
    return lane + step * LANES


def _nucleus(w: np.ndarray, cut: float, top_p: float) -> float:
    """The smallest w kept, so that those kept hold ``top_p`` of the mass of all w >= ``cut``."""
    among = w[w >= cut] if cut else w
    # Bins of a sixteenth of an octave, the largest w first; only the bin in which the mass is reached is sorted.
    bins = 2032 - (among.astype(np.float32).view(np.int32) >> 19)
    masses = np.bincount(bins, weights=among, minlength=2033).cumsum()
    wanted = top_p * masses[-1]
    at = min(int(np.searchsorted(masses, wanted, side="left")), int(bins.max()))
    inside = np.sort(among[bins == at])[::-1]
    before = (masses[at - 1] if at else 0.0) + inside.cumsum(dtype=np.float64) - inside
    return float(inside[max(1, int(np.searchsorted(before, wanted, side="left"))) - 1])


def _typical(w: np.ndarray, typical_p: float) -> np.ndarray:
    at = np.flatnonzero(w)
    p = w[at] / w[at].sum(dtype=np.float64)
    surprise = -np.log(p)
    distance = np.abs(surprise - (p * surprise).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int(np.searchsorted(p[order].cumsum(), typical_p, side="left")), len(order) - 1)
    out = np.zeros_like(w)
    near = at[distance <= distance[order[last]]]
    out[near] = w[near]
    return out
