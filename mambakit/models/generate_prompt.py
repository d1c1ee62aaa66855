"""The prompt of a `generate` call: its padding, the columns that the cache holds already, and reading it in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.prefill import prefill_states
from mambakit.models.inputs import require_inputs
from mambakit.modules import StateCache


def require_prompt(input_ids: Any, mask: Tensor | None, cache: StateCache | None) -> None:
    """The prompt is (b, l) with l >= 1, and its mask (b, l) or, after a state, (b, seen + l).

    Raises:
        TypeError: ids that are no tensor, or of another dtype.
        ValueError: other shapes.
    """
    require_inputs(input_ids, None)
    if not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (b, l) with l >= 1")
    if mask is None:
        return
    (b, length), seen = input_ids.shape, 0 if cache is None else cache.get_seq_length()
    if tuple(mask.shape) not in ((b, length), (b, seen + length)):
        after = f", or {(b, seen + length)} with the {seen} tokens before them" if seen else ""
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {(b, length)}{after}")


def cached_columns(cache: StateCache, input_ids: Tensor, mask: Tensor | None) -> int:
    """How many leading columns of ``input_ids`` (b, l) the cache already holds: none of them, or all it has seen.

    Raises:
        ValueError: both are possible.
    """
    seen, length = cache.get_seq_length(), input_ids.shape[1]
    if seen == 0 or length <= seen or (mask is not None and mask.shape[1] == seen + length):
        return 0
    if cache.ends_with(input_ids[:, :seen]):
        return seen
    raise ValueError(
        f"the cache has seen {seen} tokens and input_ids has {length}: it is not clear whether they are all new, and "
        f"their first {seen} are not the tokens this cache was left with. If all are new, pass an attention_mask of "
        f"shape {(input_ids.shape[0], seen + length)}; if not, pass only the new ones"
    )


def mask_of_padding(input_ids: Tensor, new: int, padding: int | None, ends: Any) -> Tensor | None:
    """The mask that transformers makes of (b, l) ids where none is given: padding tokens are padding unless they end
    texts. A row of nothing but padding tokens is text, such as a start token that is the padding token, too.

    Args:
        new: the last columns, of which the mask is made; the others are ones.
        padding: the padding token.
        ends: the end-of-text token, several in a list or tensor, or None.

    Returns:
        (b, l) int64, or None where there is no padding.
    """
    if padding is None or (ends is not None and bool((torch.as_tensor(ends, device="cpu") == padding).any())):
        return None
    kept = input_ids[:, -new:] != padding
    kept |= ~kept.any(1, keepdim=True)
    if bool(kept.all()):
        return None
    mask = torch.ones_like(input_ids, dtype=torch.int64)
    mask[:, -new:] = kept
    return mask


def padded_left(input_ids: Tensor, mask: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """The ids and the mask with the padding of the last ``new`` columns moved to the left of the tokens there.

    Raises:
        ValueError: a row without a token.
    """
    kept = mask[:, -new:].to(torch.bool)
    if len(empty := (~kept.any(1)).nonzero()):
        raise ValueError(
            f"attention_mask leaves row {int(empty[0])} without a token to continue from; drop the row, or give it a "
            "start token"
        )
    order = kept.to(torch.int8).argsort(dim=1, stable=True)
    cached = input_ids.shape[1] - new
    input_ids = torch.cat([input_ids[:, :cached], input_ids[:, cached:].gather(1, order)], 1)
    return input_ids, torch.cat([mask[:, :-new], mask[:, -new:].gather(1, order)], 1)


def require_left_padding(mask: Tensor) -> None:
    """ValueError where ``inputs_embeds`` are padded elsewhere."""
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("inputs_embeds are padded on the right or inside; pad them on the left, or give input_ids")


def prefill_in_chunks(model: Any, ids: Tensor, mask: Tensor | None, cache: StateCache, cached: int, chunk: int) -> None:
    """Read all columns of ``ids`` (b, l) after the first ``cached`` but the last one."""
    end = ids.shape[1] - 1
    if mask is not None:
        mask = mask[:, mask.shape[1] - ids.shape[1] :][:, cached:end]
    prefill_states(model, ids[:, cached:end], cache, attention_mask=mask, chunk_size=chunk)
