"""The distributions that `mambakit.ops.sampling` draws from, of rows that have parameters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.decoding.sampling_params import SamplingParams
from mambakit.decoding.transfers import to_device
from mambakit.ops.sampling import reference
from mambakit.ops.sampling.api import OFF

GREEDY = (0.0, *OFF[1:])


class Filters(NamedTuple):
    """What some row needs. Filters that are off in all rows cost nothing; a row's result is the same with them."""

    draws: bool = False
    """Some row is not greedy."""
    top_k: int = 0
    """The largest; 0: off in all rows."""
    top_p: bool = False
    min_p: bool = False
    typical_p: bool = False
    """typical_p or epsilon."""

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Filters:
        """Those of some texts."""
        drawn = [one.columns for one in params if not one.greedy]
        typical = any(c[4] < 1 or c[5] > 0 for c in drawn)
        return cls(
            bool(drawn), int(max((c[1] for c in drawn), default=0)), any(c[2] < 1 for c in drawn),
            any(c[3] > 0 for c in drawn), typical,
        )  # fmt: skip

    def rounded(self) -> Filters:
        """With the next power of two for ``top_k``: fewer different ones."""
        return self._replace(top_k=1 << (self.top_k - 1).bit_length() if self.top_k else 0)


def distributions(logits: Tensor, columns: Tensor, filters: Filters) -> Tensor:
    """The distributions that tokens are drawn from, without a device-to-host sync.

    Args:
        logits: (t, v).
        columns: (t, 6) float64, the parameters of each row (`SamplingParams.columns`).
        filters: those of all rows.

    Returns:
        (t, v) float64; NaN where a row has no distribution. A greedy row has all of the probability at its largest
        logit.
    """
    temperature, top_k, top_p, min_p, _, _ = columns[:, :, None].unbind(1)  # (t, 1) each
    greedy, v = temperature == 0, logits.shape[1]
    logits = logits.double()
    s = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    if filters.typical_p:
        w = reference.kept(s, *columns[:, 1:, None].unbind(1))
    else:  # the same result without the sorts of filters that are off
        w = s.exp()
        if filters.top_p:
            descending = w.sort(-1, descending=True).values
        elif filters.top_k:
            descending = w.topk(min(filters.top_k, v)).values
        if filters.top_k:
            k = torch.where(top_k == 0, v, top_k).clamp(max=descending.shape[1]).long()
            least = torch.where((top_k == 0) | (top_k >= v), 0.0, descending.gather(1, k - 1))
            w = torch.where(w >= least, w, 0.0)
            descending = torch.where(descending >= least, descending, 0.0)
        if filters.top_p:
            before = descending.cumsum(-1) - descending
            inside = (before < top_p * descending.sum(-1, keepdim=True)) | (top_p >= 1)
            kept = inside.sum(-1, keepdim=True).clamp(min=1)
            w = torch.where(w >= descending.gather(-1, kept - 1), w, 0.0)
        if filters.min_p:
            w = torch.where(w >= min_p, w, 0.0)
    found = w / w.sum(-1, keepdim=True)
    certain = torch.zeros_like(found).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy, certain, found)


def probabilities(params: SamplingParams, logits: Tensor) -> Tensor:
    """`distributions` of rows (t, v) with one text's parameters."""
    return row_probabilities([params] * len(logits), logits)


def row_probabilities(params: Sequence[SamplingParams | None], logits: Tensor) -> Tensor:
    """`distributions` of rows with these parameters; a row of None is greedy."""
    columns = [GREEDY if one is None else one.columns for one in params]
    on_device = to_device(logits.device, torch.tensor(columns, dtype=torch.float64, device="cpu"))
    return distributions(logits, on_device, Filters.of(one for one in params if one is not None))
