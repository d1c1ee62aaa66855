"""Several prompts with padding on their left, read as whole rows by the layers alone.

A padded batch could be packed, so that no work is spent on padding (`mambakit.modules.packing`). But whole rows run as
one function a layer on a GPU (`mambakit.modules.mixers.fused_layer`), padding included, and packed ones op by op: the
host then needs longer to launch them than the GPU to compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import graphs_serve
from mambakit.decoding.logits import last_logits
from mambakit.modules import StateCache
from mambakit.modules.left_padding import LeftPadding
from mambakit.modules.mixers import padded_window


def takes_padding(model: Any) -> bool:
    """Whether a model on a GPU reads padded rows, without gradients: its forward is that of its layers, nothing else is
    to be called, and its mixers take padding on the left."""
    return (
        not torch.is_grad_enabled() and graphs_serve(model) and model.is_its_layers()
        and padded_window(model.config) is not None
    )  # fmt: skip


def last_hidden(model: Any, ids: Tensor, states: StateCache, pads: Tensor | None) -> Tensor:
    """(b, 1, h) after the last tokens of (b, l) ids, through ``states``, which are updated in place.

    Args:
        pads: (b,) int64 on the model's device, columns of padding on the left of each row; None: there is none.
    """
    backbone, padding = model.backbone, None
    if pads is not None:
        padding = LeftPadding(pads.contiguous(), ids.shape[1], padded_window(model.config) or 0)
    x, residual = backbone.embeddings(ids), None
    for block in backbone.layers:
        x, residual = block(x, residual, states, padding)
    assert residual is not None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, _ = backbone.norm_f(x[:, -1:], residual[:, -1:], wide if model.config.residual_in_fp32 else None)
    return x


def pads_of(mask: Tensor) -> Tensor | None:
    """(b,) int64, how many columns of a (b, l) mask are padding on the left of each row; None where there is padding
    elsewhere, or more padding than tokens."""
    kept = mask.to(torch.bool)
    count = kept.sum(1)
    served = ~(kept[:, 1:] < kept[:, :-1]).any() & (2 * count.sum() >= mask.numel())
    return mask.shape[1] - count if bool(served) else None


def read_rows(
    model: Any, ids: Tensor, pads: Tensor, cache: StateCache, size: int, progress: Callable[[int], None] | None,
    want_logits: bool,
) -> Generator[None, None, Tensor | None]:  # fmt: skip
    """`prefill_parts` of (b, l) ids with so much padding, ``size`` columns at a time. Token 0 is read in the place of
    padding, whatever stands there: layers compute with it, and no state takes it."""
    b, length = ids.shape
    ids = ids.masked_fill(torch.arange(length, dtype=torch.int64, device=ids.device) < pads[:, None], 0)
    for start in range(0, length, size):
        stop = min(length, start + size)
        hidden = last_hidden(model, ids[:, start:stop], cache, (pads - start).clamp(0, stop - start))
        cache.advance(stop - start)
        if progress is not None:
            progress(b * stop)
        if stop < length:
            yield
    return last_logits(model, hidden) if want_logits else None
