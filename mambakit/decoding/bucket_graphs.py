"""Captured prefill: a prompt is read in buckets of powers of two tokens, each a CUDA graph from its second use on.

The forward of a short prompt is bound by the host that launches the kernels (130m model: 15 ms, of which the GPU
computes 1.3 ms), and a CUDA graph serves one shape only. Up to 512 tokens, where a forward is bound by launches and by
reading the weights, a bucket also serves fewer tokens than it has: padding on the left changes no state
(`mambakit.modules.left_padding`). So a prompt of up to 512 tokens is one replay.

One prompt is read by graphs of one row. `read_together` reads a part of several prompts by one graph, as the engine
does: sixteen short ones take hardly longer than one. The number of rows of such a graph depends on the bucket and the
engine alone, and rows without a prompt hold padding. So a prompt's result has the same bits whichever prompts are read
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mambakit.decoding.chunks import LARGEST_PADDED, bucket_of
from mambakit.decoding.cuda_graph import CapturedGraph, kept_with
from mambakit.decoding.logits import last_logits
from mambakit.decoding.padded_rows import last_hidden, takes_padding
from mambakit.modules import StateCache

# Tokens of a graph of several rows. A 1.4b model reads 4 prompts of 128 tokens in 4.9 ms on an H200, and one in 3.3: a
# prompt that is alone in its graph waits little for the padding beside it. In an engine of many slots prompts seldom
# are alone, and one graph of twice the tokens is quicker than two.
_GROUP_TOKENS, _MANY_SLOTS = 512, 32
_MOST_ROWS = 16
LARGEST_GROUPED = _GROUP_TOKENS // 2  # tokens of the largest bucket that several prompts share


def reads_in_buckets(model: Any, rows: int) -> bool:
    """Whether a prompt is read in buckets by CUDA graphs.

    It is one row, and `takes_padding` holds.
    """
    return rows == 1 and takes_padding(model)


def rows_together(bucket: int, slots: int) -> int:
    """How many prompts are read by one graph of ``bucket`` tokens each, in an engine of so many slots."""
    if bucket > LARGEST_GROUPED:
        return 1
    return min(_MOST_ROWS, _GROUP_TOKENS * (2 if slots >= _MANY_SLOTS else 1) // bucket)


def bucket_graphs(model: Any) -> BucketGraphs:
    """The model's graphs, which are kept with it. `reads_in_buckets` must hold."""
    graphs: BucketGraphs = kept_with(model, ("prefill",), lambda: BucketGraphs(model))
    return graphs


class BucketGraphs:
    """The prefill graphs of one model. They share their states and one memory pool, so only one runs at a time."""

    def __init__(self, model: Any):
        self._states: dict[int, Any] = {}  # by the number of rows
        self._used: set[tuple[int, ...]] = set()
        # By rows and length, with the input: ids and, in one more column, the padding of each row.
        self._graphs: dict[tuple[int, ...], tuple[CapturedGraph[Tensor], Tensor]] = {}
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

    def _forward(self, model: Any, padded: Tensor) -> Tensor:
        """(b, 1, h) after the last tokens of ``padded`` (b, l + 1): ids, and how many of them are padding."""
        ids, pads = padded[:, :-1], padded[:, -1]
        return last_hidden(model, ids, self._states[len(ids)], pads if ids.shape[1] <= LARGEST_PADDED else None)

    @torch.inference_mode(False)  # a graph's tensors outlive the call
    @torch.no_grad()
    def read(self, model: Any, parts: Sequence[Tensor], rows: int) -> Tensor:
        """Read a part of a prompt in each of the first rows, from the states of ``rows`` rows.

        Args:
            parts: (l_i,) int64 each, of the same bucket.

        Returns:
            (rows, 1, h) after the last tokens. The result of a graph is valid until the next bucket is read.
        """
        bucket = bucket_of(len(parts[0]))
        filled = [pad(pad(part, (bucket - len(part), 0)), (0, 1), value=bucket - len(part)) for part in parts]
        empty = [pad(parts[0].new_zeros(bucket), (0, 1), value=bucket)] * (rows - len(parts))
        padded = torch.stack([*filled, *empty])
        key = rows, bucket
        if key not in self._graphs:
            self.states(model, rows)
            held = padded.to(model.device, copy=True)
            if key not in self._used:  # eager once: kernels are compiled now, since a capture cannot
                self._used.add(key)
                return self._forward(model, held)
            shared = next(iter(self._graphs.values()), (None,))[0]
            graph = CapturedGraph(lambda: self._forward(model, held), model.device, shared=shared)
            self._graphs[key] = graph, held
        graph, held = self._graphs[key]
        held.copy_(padded, non_blocking=True)
        graph.replay()
        return graph.result


@torch.inference_mode(False)  # states outlive the call
@torch.no_grad()
def read_together(
    model: Any, parts: Sequence[Tensor], caches: Sequence[StateCache | None], rows: int, *, want_logits: bool
) -> tuple[list[StateCache], Tensor | None]:
    """Read a part of several prompts by one graph.

    Args:
        model: a causal language model in eval mode that `reads_in_buckets`.
        parts: k tensors (l_i,) int64 on the CPU, all of the same bucket; k <= ``rows``.
        caches: the state of one row to start each from; None: zero states.
        rows: of the graph, `rows_together`.
        want_logits: whether the logits after the last token of each part are needed.

    Returns:
        The states after them, ``caches`` themselves where they were given, and (k, v) logits.
    """
    count = len(parts)
    assert 0 < count <= rows
    assert len({bucket_of(len(part)) for part in parts}) == 1
    with torch.cuda.device(model.device):
        graphs = bucket_graphs(model)
        states = graphs.states(model, rows)
        if None in caches:
            states.zero_()
        for row, cache in enumerate(caches):
            if cache is not None:
                states.copy_(cache, [0], [row])
        hidden = graphs.read(model, parts, rows)
        found = []
        for row, (part, given) in enumerate(zip(parts, caches, strict=True)):
            cache = states.empty_like(1) if given is None else given
            seen = cache.get_seq_length()
            cache.copy_(states, [row], [0])
            cache.advance(seen + len(part) - cache.get_seq_length())
            found.append(cache)
        return found, last_logits(model, hidden)[:count] if want_logits else None
