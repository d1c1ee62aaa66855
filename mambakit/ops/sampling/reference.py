"""Sampling in float64, all rows at once, by sorting: the oracle of the tests. Steps as in `api.sample`."""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -1
LANES = 4096  # a lane's tokens are those of one remainder: the order in which the draw walks them


def sample(logits: Tensor, uniform: Tensor, parameters: Tensor) -> Tensor:
    logits = logits.double()
    temperature, top_k, top_p, min_p, typical_p, epsilon = parameters.double().unsqueeze(-1).unbind(1)  # (b, 1) each
    greedy = temperature == 0
    best = logits.amax(1, keepdim=True)  # NaN where a logit is
    s = (logits - best) / torch.where(greedy, 1.0, temperature)
    w = kept(s, top_k, top_p, min_p, typical_p, epsilon)
    order = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    order = torch.cat([order[lane::LANES] for lane in range(min(LANES, len(order)))])
    cumulative = w[:, order].cumsum(1)
    drawn = order[(cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(1, keepdim=True)]
    token = torch.where(greedy, logits.argmax(1, keepdim=True), drawn)
    usable = ~best.isnan() & torch.where(greedy, best > -torch.inf, best.isfinite())
    return torch.where(usable, token, NO_TOKEN)[:, 0]


def kept(s: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, typical_p: Tensor, epsilon: Tensor) -> Tensor:
    """w = exp(s) where the filters keep a token, else 0.

    Args:
        s: (b, v), scaled logits minus their maximum.
        top_k, top_p, min_p, typical_p, epsilon: (b, 1).

    Returns:
        (b, v).
    """
    v = s.shape[1]
    w = s.exp()
    descending = w.sort(1, descending=True).values
    k = torch.where(top_k == 0, v, top_k).clamp(max=v).long()
    w = torch.where(w >= descending.gather(1, k - 1), w, 0.0)
    w = torch.where(w >= _cut(w, top_p), w, 0.0)
    w = torch.where(w >= min_p, w, 0.0)
    p = w / w.sum(1, keepdim=True)
    surprise = -torch.where(p > 0, p, 1.0).log()
    distance = (surprise - (p * surprise).sum(1, keepdim=True)).abs()
    nearest = torch.where(p > 0, distance, torch.inf).sort(1)
    mass = p.gather(1, nearest.indices).cumsum(1)
    last = (mass < typical_p).sum(1, keepdim=True).clamp(max=v - 1)
    w = torch.where((typical_p >= 1) | (distance <= nearest.values.gather(1, last)), w, 0.0)
    p = w / w.sum(1, keepdim=True)
    return torch.where((p >= epsilon) | (p == p.amax(1, keepdim=True)), w, 0.0)


def _cut(w: Tensor, top_p: Tensor) -> Tensor:
    """(b, 1) the smallest w that is kept so that the kept ones hold ``top_p`` of the mass."""
    descending = w.sort(1, descending=True).values
    before = descending.cumsum(1) - descending  # mass of what is larger
    inside = (before < top_p * descending.sum(1, keepdim=True)) | (top_p >= 1)
    return descending.gather(1, inside.sum(1, keepdim=True).clamp(min=1) - 1)
