"""A text read layer by layer, with what each layer's selection chose shown to a visitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mambakit.modules import MambaMixer
from mambakit.modules.mixers.selection import Selection


def require_traceable(model: Any) -> None:
    """ValueError for a model that is more than its layers, or whose layers have another mixer than Mamba's."""
    if not model.is_its_layers():
        raise ValueError(
            "the model has hooks or a forward of its own, or is training, so its layers cannot be read one by one; "
            "load it anew, in eval mode"
        )
    for index, block in enumerate(model.backbone.layers):
        if not isinstance(block.mixer, MambaMixer):
            raise ValueError(f"layer {index} is a {type(block.mixer).__name__}; only Mamba's selection can be shown")


@torch.no_grad()
def traced_chunks(
    model: Any, ids: Tensor, chunk_size: int, visit: Callable[[int, int, Selection], None]
) -> Iterator[Tensor]:
    """Read one text from a zero state, chunk by chunk.

    Args:
        model: one that `require_traceable` accepts.
        ids: (l,) int64 on the model's device.
        chunk_size: tokens of a forward; memory is proportional to it.
        visit: called for each chunk and layer with the chunk's first position, the layer's index and its selection,
            of one row.

    Yields:
        (c, h) of each chunk: the last hidden states, which predict the tokens after.
    """
    backbone = model.backbone
    cache = backbone.new_cache(1)
    for start in range(0, len(ids), chunk_size):
        x, residual = backbone.embeddings(ids[None, start : start + chunk_size]), None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        for index, block in enumerate(backbone.layers):
            y, residual = block.norm(x, residual, wide if block.residual_in_fp32 else block.norm.weight.dtype)
            x, selection = block.mixer.traced(y, cache)
            visit(start, index, selection)
        x, _ = backbone.norm_f(x, residual, wide if model.config.residual_in_fp32 else None)
        cache.advance(x.shape[1])
        yield x[0]
