"""Captured prefill: buckets of powers of two tokens, each a CUDA graph from its second use on.

One prompt is read by graphs of one row. `read_together` reads the same bucket of several prompts by one graph, as
the engine does: short prompts are bound by launches and by reading the weights, so that sixteen take hardly longer than
one. The number of rows of such a graph depends on the bucket's length alone, and rows without a prompt read padding. So
a prompt's result has the same bits whichever prompts are read beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import CapturedGraph, graphs_serve, kept_with
from mambakit.decoding.logits import last_logits
from mambakit.modules import StateCache

# Tokens of a graph of several rows: no more than cost hardly more time than a single row. On an H200 a 130m model reads
# 32 tokens in 1.0 ms and a 1.4b model in 2.8 ms, both bound by launches and weights.
_GROUP_TOKENS = 512
MOST_ROWS = 16
LARGEST_GROUPED = _GROUP_TOKENS // 2  # tokens of the largest bucket that several prompts share


def reads_in_buckets(model: Any, rows: int) -> bool:
    """Whether a prompt is cut into powers of two and read by CUDA graphs: one row, on a GPU, without gradients."""
    return rows == 1 and not torch.is_grad_enabled() and graphs_serve(model)


def rows_together(bucket: int) -> int:
    """How many prompts are read by one graph of ``bucket`` tokens each."""
    return max(1, min(MOST_ROWS, _GROUP_TOKENS // bucket))


def bucket_graphs(model: Any) -> BucketGraphs:
    """The model's graphs, which are kept with it. `reads_in_buckets` must hold."""
    graphs: BucketGraphs = kept_with(model, ("prefill",), lambda: BucketGraphs(model))
    return graphs


class BucketGraphs:
    """The prefill graphs of one model. They share their states and one memory pool, so only one runs at a time."""

    def __init__(self, model: Any):
        self._states: dict[int, Any] = {}  # by the number of rows
        self._used: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], tuple[CapturedGraph[Tensor], Tensor]] = {}  # by rows and length; input ids
        self.states(model, 1)

    def states(self, model: Any, rows: int) -> Any:
        """The states that graphs of so many rows read and write."""
        if rows not in self._states:
            with torch.inference_mode(False), torch.no_grad():
                self._states[rows] = model.backbone.new_cache(rows)
        return self._states[rows]

    def load(self, cache: StateCache) -> None:
        """Start the graphs of one row from a copy of this state."""
        self._states[1].load_(cache)

    def store(self, cache: StateCache, tokens: int) -> None:
        """Copy the state of the graphs of one row into ``cache``, and count ``tokens`` more as seen there."""
        seen = cache.get_seq_length()
        cache.load_(self._states[1])
        cache.advance(seen + tokens - cache.get_seq_length())

    def _forward(self, model: Any, ids: Tensor) -> Tensor:
        return model.backbone(ids, cache_params=self._states[len(ids)]).last_hidden_state[:, -1:]

    @torch.inference_mode(False)  # a graph's tensors outlive the call
    @torch.no_grad()
    def read(self, model: Any, ids: Tensor) -> Tensor:
        """Read ids (b, l), l a power of two, from the states of b rows.

        Returns:
            (b, 1, h) after the last tokens. The result of a graph is valid until the next bucket is read.
        """
        key = tuple(ids.shape)
        if key not in self._graphs:
            self.states(model, len(ids))
            if key not in self._used:  # eager once: kernels are compiled now, since a capture cannot
                self._used.add(key)
                return self._forward(model, ids)
            held = ids.clone() if ids.is_cuda else ids.to(model.device)
            shared = next(iter(self._graphs.values()), (None,))[0]
            graph = CapturedGraph(lambda: self._forward(model, held), model.device, shared=shared)
            self._graphs[key] = graph, held
        graph, held = self._graphs[key]
        held.copy_(ids, non_blocking=True)
        graph.replay()
        return graph.result


@torch.inference_mode(False)  # states outlive the call
@torch.no_grad()
def read_together(
    model: Any, parts: Sequence[Tensor], caches: Sequence[StateCache | None], *, want_logits: bool
) -> tuple[list[StateCache], Tensor | None]:
    """Read the next bucket of several prompts by one graph.

    Args:
        model: a causal language model in eval mode that `reads_in_buckets`.
        parts: k tensors (l,) int64 on the CPU, l a power of two, k <= ``rows_together(l)``.
        caches: the state of one row to start each from; None: zero states.
        want_logits: whether the logits after the last token of each part are needed.

    Returns:
        The states after them, ``caches`` themselves where they were given, and (k, v) logits.
    """
    bucket, count = len(parts[0]), len(parts)
    rows = rows_together(bucket)
    assert 0 < count <= rows
    with torch.cuda.device(model.device):
        graphs = bucket_graphs(model)
        states = graphs.states(model, rows)
        if None in caches:
            states.zero_()
        for row, cache in enumerate(caches):
            if cache is not None:
                states.copy_(cache, [0], [row])
        padding = [parts[0].new_zeros(bucket)] * (rows - count)
        ids = torch.stack([*parts, *padding]).to(model.device, non_blocking=True)
        hidden = graphs.read(model, ids)
        found = []
        for row, given in enumerate(caches):
            cache = states.empty_like(1) if given is None else given
            seen = cache.get_seq_length()
            cache.copy_(states, [row], [0])
            cache.advance(seen + bucket - cache.get_seq_length())
            found.append(cache)
        return found, last_logits(model, hidden)[:count] if want_logits else None
