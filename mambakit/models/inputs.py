"""From forward's arguments to a packing: masks, positions and cumulative lengths, checked once per forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.modules.cache import MambaCache
from mambakit.modules.packing import Packing, document_starts

IGNORE = -100


def one_cache(**given: Any) -> MambaCache | None:
    """The state among the names of one argument.

    Raises:
        ValueError: two names with two states.
        TypeError: something that is no `MambaCache`.
    """
    caches = {name: cache for name, cache in given.items() if cache is not None}
    cache = next(iter(caches.values()), None)
    if any(other is not cache for other in caches.values()):
        raise ValueError(f"{' and '.join(caches)} are two names of one argument; give one")
    if cache is not None and not isinstance(cache, MambaCache):
        raise TypeError(f"the cache is a {type(cache).__name__}; a Mamba model continues from a mambakit.MambaCache")
    return cache


def packing_of(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: MambaCache | None,
) -> Packing | None:
    """The packing of a (b, l) batch, or None where it can run as it is."""
    b = shape[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, shape)
        if attention_mask is not None or position_ids is not None:
            raise ValueError("cu_seqlens already says where sequences lie; drop attention_mask and position_ids")
        if cache is not None and cache.max_batch_size < cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"cu_seqlens has {cu_seqlens.shape[0] - 1} sequences but the cache {cache.max_batch_size} rows"
            )
        return Packing.from_cu_seqlens(cu_seqlens.to(device), shape)
    if cache is not None and cache.max_batch_size != b:
        raise ValueError(
            f"the batch has {b} rows but the cache {cache.max_batch_size}; use cache.select(...) or a new cache"
        )
    seen = 0 if cache is None else cache.get_seq_length()
    keep = (
        None
        if attention_mask is None
        else _new_columns("attention_mask", attention_mask, shape, seen).to(device).bool()
    )
    starts = None
    if position_ids is not None:
        position_ids = position_ids if position_ids.shape[0] == b else position_ids.expand(b, -1)
        starts = document_starts(_new_columns("position_ids", position_ids, shape, seen).to(device), keep)
        if seen == 0:
            starts[:, :1] = False  # the first token has nothing to be cut from
    if keep is None and starts is None:
        return None
    return Packing.from_batch(keep, starts, seen > 0, shape)


def _new_columns(name: str, given: Tensor, shape: tuple[int, int], seen: int) -> Tensor:
    """The columns of a (b, l) or (b, seen + l) tensor that belong to the new tokens."""
    b, length = shape
    if given.dim() != 2 or given.shape[0] != b or given.shape[1] not in (length, seen + length):
        also = f", or {(b, seen + length)} with the tokens already in the state" if seen else ""
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {(b, length)}{also}")
    return given[:, given.shape[1] - length :]


def _check_cu_seqlens(cu: Tensor, shape: tuple[int, int]) -> None:
    b, length = shape
    if b != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row, but the batch has {b}; flatten it to (1, total)")
    if cu.dim() != 1 or cu.numel() < 2 or cu.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu.shape)} {cu.dtype}, expected (s + 1,) int32 with s >= 1")
    if torch.compiler.is_compiling():
        return
    values = cu.tolist()
    if values[0] != 0 or values[-1] != length or values != sorted(values):
        raise ValueError(f"cu_seqlens must rise from 0 to the packed length {length}, got {values}")


def shifted_labels(
    labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Targets (b, l): position t is to predict token t + 1, -100 where there is none to predict."""
    labels = labels.clone()
    length = labels.shape[1]
    if attention_mask is not None:
        labels[attention_mask[:, attention_mask.shape[1] - length :].to(labels.device) == 0] = IGNORE
    if cu_seqlens is not None:
        first = cu_seqlens[:-1].long()
        labels[:, first[first < length]] = IGNORE
    if position_ids is not None:
        starts = document_starts(position_ids[:, position_ids.shape[1] - length :].to(labels.device))
        labels[starts.expand_as(labels)] = IGNORE
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return targets
