"""forward's arguments made into a packing: masks, positions and cumulative lengths, checked once per forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.models.documents import Marks, as_lengths, documents_of, given_marks, require_cumulative
from mambakit.modules.packing import Packing
from mambakit.modules.state_cache import StateCache
from mambakit.modules.tracing import values_are_hidden

IGNORE = -100


def one_cache(**given: Any) -> StateCache | None:
    """The state, given under one of its names (`mambakit.models.outputs.CACHE_NAMES`).

    Raises:
        ValueError: two names with two states.
        TypeError: something that is not a `StateCache`.
    """
    caches = {name: cache for name, cache in given.items() if cache is not None}
    cache = next(iter(caches.values()), None)
    if any(other is not cache for other in caches.values()):
        raise ValueError(f"{' and '.join(caches)} are two names of one argument; give one")
    if cache is not None and not isinstance(cache, StateCache):
        raise TypeError(
            f"the cache is a {type(cache).__name__}; a model continues from a mambakit.MambaCache or another StateCache"
        )
    return cache


def packing_of(
    shape: tuple[int, int], device: torch.device, attention_mask: Tensor | None, marks: Marks, cache: StateCache | None
) -> Packing | None:
    """The packing of a (b, l) batch, or None where there is nothing to pack."""
    b, length = shape
    if marks.cu_seqlens is not None:
        cu_seqlens = as_lengths("cu_seqlens", marks.cu_seqlens, device)
        if b != 1:
            raise ValueError(
                f"cu_seqlens packs sequences into one row, but the batch has {b}; flatten it to (1, {b * length})"
            )
        if attention_mask is None and len(given_marks(marks)) == 1:
            if not values_are_hidden(cu_seqlens):
                require_cumulative("cu_seqlens", cu_seqlens, shape)
        else:
            keep, _ = documents_of(shape, device, attention_mask, marks)
            if keep is not None and (values_are_hidden(keep) or not bool(keep.all())):
                raise ValueError("cu_seqlens packs sequences without padding; drop what attention_mask leaves out")
        if cache is not None and cache.max_batch_size < cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"cu_seqlens has {cu_seqlens.shape[0] - 1} sequences but the cache {cache.max_batch_size} rows"
            )
        return Packing.from_cu_seqlens(cu_seqlens, shape)
    if cache is not None and cache.max_batch_size != b:
        raise ValueError(
            f"the batch has {b} rows but the cache {cache.max_batch_size}; use cache.select(...) or a new cache"
        )
    seen = 0 if cache is None else cache.get_seq_length()
    keep, starts = documents_of(shape, device, attention_mask, marks, seen)
    if keep is None and starts is None:
        return None
    return Packing.from_batch(keep, starts, seen > 0, shape)


def shifted_labels(labels: Tensor, attention_mask: Tensor | None, marks: Marks) -> Tensor:
    """Targets (b, l) int64: token t + 1 at position t; -100 where the loss is not computed."""
    last = labels.shape[1]
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=labels.device)[:, -last:]
    cut = {
        name: torch.as_tensor(value, device=labels.device)[..., -last:]
        for name, value in given_marks(marks).items()
        if name in ("position_ids", "seq_idx")
    }
    keep, starts = documents_of((labels.shape[0], last), labels.device, mask, marks._replace(**cut), check=False)
    if keep is not None:
        labels = labels.masked_fill(~keep, IGNORE)
    if starts is not None:
        labels = labels.masked_fill(starts, IGNORE)
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
