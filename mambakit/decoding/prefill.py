"""Prefill: read many tokens into a recurrent state at once. Every prompt and document is read by the functions here.

A prompt is cut into chunks, so that memory does not grow with its length. On a GPU a single prompt is read by captured
graphs (`mambakit.decoding.bucket_graphs`), a padded batch as whole rows (`mambakit.decoding.padded_rows`). How it is
cut depends on its length and the chunk size alone, never on which graphs exist already. So a prompt's result has the
same bits whatever was read before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.bucket_graphs import bucket_graphs, reads_in_buckets
from mambakit.decoding.chunks import Prompts, chunks, parts, row_count, size_of_chunks, texts_of
from mambakit.decoding.logits import last_logits
from mambakit.decoding.native_prompts import NativePrompts, native_prompts
from mambakit.decoding.padded_rows import pads_of, read_rows, takes_padding
from mambakit.modules import StateCache
from mambakit.modules.interception import is_ours

Progress = Callable[[int], None]


def prefill(
    model: Any,
    prompts: Prompts,
    cache: StateCache,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Read prompts, starting from the states in ``cache``, and update the cache in place.

    Args:
        model: a causal language model in eval mode.
        prompts: (b, l) int64 with l >= 1, or b tensors (l_i,) with l_i >= 1, on the model's device.
        cache: the states of b rows.
        attention_mask: (b, l), 0 where a token of (b, l) prompts is padding. The last token of every row must not be
            padding.
        chunk_size: tokens per forward: per row of (b, l) prompts, or of all rows together where texts are packed.
            Default: those of `mambakit.decoding.chunks.CHUNK_SIZES`.
        progress: called after each chunk with the number of tokens read so far, summed over rows, padding included.

    Returns:
        (b, v) logits after the last token of each row, float32 (float64 in a float64 model).
    """
    logits = _finish(prefill_parts(model, prompts, cache, attention_mask, chunk_size, progress, by_layer=False))
    assert logits is not None
    return logits


def prefill_states(
    model: Any,
    prompts: Prompts,
    cache: StateCache,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """`prefill` without the logits: it only updates the states. Prompts may be empty."""
    _finish(
        prefill_parts(model, prompts, cache, attention_mask, chunk_size, progress, want_logits=False, by_layer=False)
    )


def prefill_parts(
    model: Any,
    prompts: Prompts,
    cache: StateCache,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
    *,
    want_logits: bool = True,
    by_layer: bool = True,
) -> Generator[None, None, Tensor | None]:
    """`prefill` as a generator, for a caller that has other work to do in between. The result has the same bits.

    It yields after every layer of a single text, and after every chunk of several texts. Some single texts are coarser:
    on a GPU all buckets of a prompt run without a yield, and a model with hooks or another forward is called once per
    chunk. The cache is valid only after the generator has ended.

    Returns:
        The generator's return value is what `prefill` returns; None without ``want_logits`` or where all prompts are
        empty.
    """
    texts, longest = texts_of(prompts)
    if not longest:
        return None
    size = size_of_chunks(model.device, texts, chunk_size)
    if attention_mask is None and reads_in_buckets(model, row_count(texts)):
        ids = texts if isinstance(texts, Tensor) else texts[0][None]
        with torch.cuda.device(model.device):
            graphs = bucket_graphs(model)
            graphs.load(cache)
            done = 0
            ids = ids[0]
            for part in ids.split(parts(len(ids), size)):  # without a yield: the graphs share one state
                hidden = graphs.read(model, [part], 1)
                done += len(part)
                if progress is not None:
                    progress(done)
            graphs.store(cache, done)
        return last_logits(model, hidden) if want_logits else None
    if attention_mask is not None and isinstance(texts, Tensor) and takes_padding(model):
        pads = pads_of(attention_mask)
        if pads is not None:
            return (yield from read_rows(model, texts, pads, cache, size, progress, want_logits))
    if attention_mask is None and isinstance(texts, Tensor):
        reader = native_prompts(model, cache)
        if reader is not None:
            return (yield from _by_library(reader, texts, cache, size, progress, want_logits, by_layer))
    found: list[Tensor] = []
    order: list[int] = []
    # A model with a hook or a replaced forward is itself called for every chunk if logits are wanted.
    ours = is_ours(model)
    keywords: dict[str, Any] = {"return_dict": True} if ours else {}
    for chunk in chunks(texts, attention_mask, size):
        last = want_logits and bool(chunk.ends)
        if by_layer and row_count(texts) == 1 and attention_mask is None and model.is_its_layers():
            logits = yield from _by_layer(model, chunk.ids, cache, last)
        elif last or (want_logits and not ours):
            kept = 1 if chunk.positions is None else chunk.positions
            logits = model(chunk.ids, cache_params=cache, logits_to_keep=kept, **chunk.marks, **keywords).logits
            logits = logits[:, -1] if chunk.positions is None else logits[0]
        else:
            model.backbone(chunk.ids, cache_params=cache, **chunk.marks)
        if last:
            found.append(logits)
            order += chunk.ends
        if progress is not None:
            progress(chunk.done)
        if not chunk.is_last:
            yield
    if not want_logits:
        return None
    if len(found) == 1 and order == sorted(order):
        return found[0]
    return torch.cat(found)[torch.tensor(order, dtype=torch.int64, device="cpu").argsort().to(found[0].device)]


def hidden_states(
    model: Any,
    prompts: Prompts,
    cache: StateCache | None = None,
    *,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Tensor]]:
    """Read prompts chunk by chunk and yield the last hidden states, for scores and perplexities.

    Args:
        prompts: as in `prefill`, but texts may be empty.
        cache: the states to start from, updated in place. None: start from zero states and keep none, which is possible
            only where all texts fit into one chunk.

    Yields:
        A list with one tensor (c_i, h) per text: the hidden states of its c_i tokens in this chunk. ``lm_head`` of each
        predicts the token after it.

    Raises:
        ValueError: the texts need several chunks, and there is no cache.
    """
    texts, longest = texts_of(prompts)
    if not longest:
        return
    size = size_of_chunks(model.device, texts, chunk_size)
    state: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_params": cache}
    for chunk in chunks(texts, None, size):
        if cache is None and not chunk.is_last:
            raise ValueError(
                f"{sum(map(len, texts))} tokens are more than a chunk of {size}, which needs a cache to carry the state"
            )
        hidden = model.backbone(chunk.ids, **chunk.marks, **state).last_hidden_state
        yield list(hidden[0].split(chunk.lengths)) if len(hidden) == 1 else list(hidden)
        if progress is not None:
            progress(chunk.done)


def hidden_states_in_parts(
    model: Any, ids: Tensor, cache: StateCache, chunk_size: int
) -> Generator[Tensor | None, None, None]:
    """`hidden_states` of one text, for a caller that has other work to do in between.

    Args:
        ids: (l,) int64, on the model's device; it may be empty.
        cache: the state of one row, updated in place. It is valid after each chunk.
        chunk_size: tokens per forward.

    Yields:
        None after every layer where the model is no more than its layers; after each chunk its (c, h) hidden states.
    """
    for chunk in ids[None].split(chunk_size, dim=1) if len(ids) else ():
        if model.is_its_layers():
            hidden = yield from _by_layer(model, chunk, cache, False)
        else:
            hidden = model.backbone(chunk, cache_params=cache).last_hidden_state
        yield hidden[0]


# -- the ways to read a chunk ------------------------------------------------------------------------------------------


def _by_layer(model: Any, ids: Tensor, cache: StateCache, want_logits: bool) -> Generator[None, None, Tensor]:
    """The forward of a model layer by layer, with a yield after each. Returns (b, v) logits if they are wanted."""
    backbone = model.backbone
    x, residual = backbone.embeddings(ids), None
    for block in backbone.layers:
        x, residual = block(x, residual, cache, None)
        yield
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, _ = backbone.norm_f(x, residual, wide if model.config.residual_in_fp32 else None)
    cache.advance(ids.shape[1])
    return last_logits(model, x[:, -1:]) if want_logits else x


def _by_library(
    reader: NativePrompts, ids: Tensor, cache: StateCache, size: int, progress: Progress | None, want_logits: bool,
    by_layer: bool,
) -> Generator[None, None, Tensor | None]:  # fmt: skip
    """(b, l) prompts by the native library. Returns (b, v) logits if they are wanted."""
    done = 0
    for part in ids.split(size, dim=1):
        done += part.shape[1]
        is_last = done == ids.shape[1]
        reading = reader.read(part, cache, want_logits and is_last)
        if by_layer and len(ids) == 1:
            logits = yield from reading
        else:
            logits = _finish(reading)
        if progress is not None:
            progress(len(ids) * done)
        if not is_last:
            yield
    return logits


def _finish(parts: Generator[None, None, Tensor | None]) -> Tensor | None:
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value
