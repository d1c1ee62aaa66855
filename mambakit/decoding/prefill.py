"""Prefill: tokens into a state, many at a time. Everything that reads a prompt or a document does it here.

A prompt is cut into chunks, so that memory does not grow with its length. On a GPU the chunks of a single prompt are powers of two
tokens ("buckets"), each a CUDA graph from its second use on: a forward of a short prompt is bound by the host that launches it (130m:
15 ms for what the card does in 1.3), and a graph serves one length only. The cut depends on the prompt and the chunk size alone,
never on which graphs exist, so that a prompt's bits do not depend on what was read before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.chunks import Prompts, buckets, chunks, row_count, size_of_chunks, texts_of
from mambakit.decoding.cuda_graph import CapturedGraph, graphs_serve, kept_with
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
    """Read prompts after what ``cache`` has seen, and bring it up to date.

    Args:
        model: a causal language model in eval mode.
        prompts: (b, l) int64 with l >= 1, or b tensors (l_i,) with l_i >= 1, on the model's device.
        cache: of b rows.
        attention_mask: (b, l), 0 where a token of (b, l) prompts is padding; every row's last token is a real one.
        chunk_size: tokens per forward: of each row of (b, l) prompts, of all rows together where they are packed. Unless given,
            those of `mambakit.decoding.chunks.CHUNK_SIZES`.
        progress: called after each chunk with the number of tokens read so far, of all rows (padding included).

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
    """`prefill` without the logits, for the states alone; prompts may be empty."""
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
    """`prefill` with a pause after every layer of a single text (after every chunk of several), for a caller who has other work to do
    meanwhile: the same bits; the cache is right only at the end. On a GPU a bucket is one part, and so is a chunk of a model whose call
    is more than its layers one after the other (hooks, another forward).

    Returns (as the generator's value) what `prefill` returns, None without ``want_logits``.
    """
    texts, longest = texts_of(prompts)
    if not longest:
        return None
    size = size_of_chunks(model.device, texts, chunk_size)
    if attention_mask is None and reads_in_buckets(model, row_count(texts)):
        ids = texts if isinstance(texts, Tensor) else texts[0][None]
        with torch.cuda.device(model.device):
            graphs: _BucketGraphs = kept_with(model, ("prefill",), lambda: _BucketGraphs(model))
            graphs.load(cache)
            done = 0
            for part in ids.split(buckets(ids.shape[1], size), 1):  # without a pause: the graphs share one state
                hidden = graphs.read(model, part)
                done += part.shape[1]
                if progress is not None:
                    progress(done)
            graphs.store(cache, done)
        return _head(model, hidden) if want_logits else None
    found: list[Tensor] = []
    order: list[int] = []
    # A model with a forward of its own, or with a hook, is called itself for every chunk where logits are asked for.
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
    """Read prompts chunk by chunk, for scores and perplexities: the last hidden states of what each chunk has of each text.

    Args:
        prompts: as `prefill`'s; texts may be empty.
        cache: what they go on from, brought up to date; None: from a zero state, and none is kept. It must be given where a text does
            not fit into one chunk.

    Yields:
        For each text (c_i, h), the hidden states of its next c_i tokens, from which ``lm_head`` predicts what follows each of them.

    Raises:
        ValueError: several chunks and no cache.
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


# -- the ways to read a chunk -------------------------------------------------------------------------------------------


def _by_layer(model: Any, ids: Tensor, cache: StateCache, want_logits: bool) -> Generator[None, None, Tensor]:
    """The call of a model that is its layers, with a pause after each of them; (b, v) logits, or nothing of use."""
    backbone = model.backbone
    x, residual = backbone.embeddings(ids), None
    for block in backbone.layers:
        x, residual = block(x, residual, cache, None)
        yield
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, _ = backbone.norm_f(x, residual, wide if model.config.residual_in_fp32 else None)
    cache.advance(ids.shape[1])
    return _head(model, x[:, -1:]) if want_logits else x


def _head(model: Any, hidden: Tensor) -> Tensor:
    """(b, v) logits of (b, 1, h)."""
    logits = model.lm_head(hidden)[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def _finish(parts: Generator[None, None, Tensor | None]) -> Tensor | None:
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def reads_in_buckets(model: Any, rows: int) -> bool:
    """Whether a prompt is cut into powers of two, read by graphs: one row on a GPU where a step can be a graph."""
    return rows == 1 and not torch.is_grad_enabled() and graphs_serve(model)


class _BucketGraphs:
    """The prefill graphs of one model. They work on a state of their own, and share their memory: one runs at a time."""

    def __init__(self, model: Any):
        self.states: Any = model.backbone.new_cache(1)
        self._used: set[int] = set()
        self._graphs: dict[int, tuple[CapturedGraph[Tensor], Tensor]] = {}  # by length, with what it reads

    def load(self, cache: StateCache) -> None:
        """Go on from this state."""
        self.states.load_(cache)

    def store(self, cache: StateCache, tokens: int) -> None:
        """Leave the state in ``cache``, which is ``tokens`` behind it."""
        seen = cache.get_seq_length()
        cache.load_(self.states)
        cache.advance(seen + tokens - cache.get_seq_length())

    def _forward(self, model: Any, ids: Tensor) -> Tensor:
        return model.backbone(ids, cache_params=self.states).last_hidden_state[:, -1:]

    @torch.inference_mode(False)  # a graph's tensors outlive the call
    @torch.no_grad()
    def read(self, model: Any, ids: Tensor) -> Tensor:
        """(1, 1, h) after the last token; of a graph valid until the next bucket."""
        length = ids.shape[1]
        if length not in self._graphs:
            if length not in self._used:  # compiles what is not compiled yet, which a capture must not
                self._used.add(length)
                return self._forward(model, ids)
            held = ids.clone()
            shared = next(iter(self._graphs.values()), (None,))[0]
            graph = CapturedGraph(lambda: self._forward(model, held), model.device, shared=shared)
            self._graphs[length] = graph, held
        graph, held = self._graphs[length]
        held.copy_(ids)
        graph.replay()
        return graph.result
