"""A prompt of one text into a state. On a GPU in pieces of powers of two tokens, each a CUDA graph from its second use on.

A forward of a short prompt is bound by the host that launches it: 130m takes 15 ms for what the card does in 1.3. A graph takes that
away, and serves one length only; so a prompt is cut into the powers of two that it is the sum of. The cut is the same whether the
graphs are there or not, so that a prompt's bits do not depend on what was read before.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.graph_step import graphs_serve, kept_with
from mambakit.modules import MambaCache

LONGEST = 4096  # tokens of a piece: beyond, the card is the slower one, and memory grows with it


def reads_in_pieces(model: Any, rows: int) -> bool:
    """Whether `read_prompt` cuts a prompt into pieces: one row on a GPU where a step can be a graph."""
    return rows == 1 and not torch.is_grad_enabled() and graphs_serve(model)


def read_prompt(model: Any, ids: Tensor, cache: MambaCache, longest: int = LONGEST) -> Tensor:
    """Read ``ids`` (b, l), l >= 1, after what ``cache`` has seen, and bring it up to date; returns the logits (b, v) after them.

    Pieces have at most ``longest`` tokens where there are pieces.
    """
    if not reads_in_pieces(model, ids.shape[0]):
        return model(ids, cache_params=cache, logits_to_keep=1).logits[:, -1]
    return _read_in_pieces(model, ids, cache, longest)


def _read_in_pieces(model: Any, ids: Tensor, cache: MambaCache, longest: int) -> Tensor:
    with torch.cuda.device(model.device):
        return kept_with(model, ("prompt",), lambda: _Pieces(model))(ids, cache, longest)


def prompt_parts(model: Any, ids: Tensor, cache: MambaCache) -> Generator[None, None, Tensor]:
    """`read_prompt` of one text with a pause after every layer, so that others need not wait for the whole: the same bits, and the
    cache is right only at the end. On a GPU, and where somebody would miss the call of the model as a whole, it is one part.
    """
    if reads_in_pieces(model, ids.shape[0]):
        return _read_in_pieces(model, ids, cache, LONGEST)
    if not model.is_its_layers():
        return model(ids, cache_params=cache, logits_to_keep=1).logits[:, -1]
    backbone = model.backbone
    x, residual = backbone.embeddings(ids), None
    for block in backbone.layers:
        x, residual = block(x, residual, cache, None)
        yield
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, _ = backbone.norm_f(x, residual, wide if model.config.residual_in_fp32 else None)
    cache.advance(ids.shape[1])
    logits = model.lm_head(x[:, -1:])[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def pieces(length: int, longest: int) -> list[int]:
    """Powers of two that add up to ``length``, none above ``longest``, the largest first."""
    most = 1 << (max(1, min(longest, LONGEST)).bit_length() - 1)
    sizes = [most] * (length // most)
    rest = length % most
    return sizes + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


class _Pieces:
    """The graphs of one model. They work on a state of their own, and share their memory: one runs at a time."""

    def __init__(self, model: Any):
        self.model = model
        self.cache = model.backbone.new_cache(1)
        self._used: set[int] = set()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, ids: Tensor, cache: MambaCache, longest: int) -> Tensor:
        self.cache.conv_states.copy_(cache.conv_states)
        self.cache.ssm_states.copy_(cache.ssm_states)
        for part in ids.split(pieces(ids.shape[1], longest), 1):
            hidden = self._read(part)
        cache.conv_states.copy_(self.cache.conv_states)
        cache.ssm_states.copy_(self.cache.ssm_states)
        cache.advance(ids.shape[1])
        logits = self.model.lm_head(hidden)[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model.backbone(ids, cache_params=self.cache).last_hidden_state[:, -1:]

    @torch.inference_mode(False)  # a graph's tensors outlive the call
    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        """(1, 1, h) after the last token; of a graph valid until the next piece."""
        length = ids.shape[1]
        if length not in self._graphs:
            if length not in self._used:  # compiles what is not compiled yet, which a capture must not
                self._used.add(length)
                return self._forward(ids)
            graph, held = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(graph, pool=self._pool):
                hidden = self._forward(held)
            self._pool = graph.pool()
            self._graphs[length] = graph, held, hidden
        graph, held, hidden = self._graphs[length]
        held.copy_(ids)
        graph.replay()
        return hidden
