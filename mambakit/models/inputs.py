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


def require_inputs(input_ids: Any, inputs_embeds: Any) -> None:
    """Token ids (b, l) of an integer dtype, or embeddings (b, l, h) in their place. Their values are not looked at.

    Raises:
        TypeError: what is no tensor, or of another dtype.
        ValueError: both, neither, or another shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is None:
        _require_tensor("inputs_embeds", inputs_embeds, "(b, l, h)")
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds has dtype {inputs_embeds.dtype}; ids are input_ids")
    else:
        _require_tensor("input_ids", input_ids, "(b, l)", "a tensor of token ids")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids has dtype {input_ids.dtype}; token ids are int64 or int32")


def require_labels(labels: Any, shape: tuple[int, ...], remedy: str = "") -> None:
    """Labels are a tensor of this shape. Raises TypeError and ValueError."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels are a {type(labels).__name__}; give a tensor, {tuple(shape)}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(shape)}{remedy}")


def _require_tensor(name: str, value: Any, axes: str, what: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give {what}, {axes}")
    wanted = axes.count(",") + 1
    if value.dim() != wanted:
        remedy = f"; one sequence is {name}[None]" if value.dim() == wanted - 1 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {axes}{remedy}")


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
