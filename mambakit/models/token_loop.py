"""The tokens of one `generate` call: the steps that transformers' loop takes, and a loop of our own where tokens are the likeliest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambakit.models.graph_step import GraphStep, graph_step, graphs_serve
from mambakit.models.step import native_serves, native_step, token_step
from mambakit.modules import MambaCache


class GeneratingSteps:
    """The steps of one `generate` call: forward asks it for each token's logits.

    A step is made for a cache's own tensors. They stay in place while rows go on side by side, so the second token against
    the same tensors makes the step and later ones use it; a beam search, which moves rows at every token, never does.
    On a GPU the state moves into the graph's own memory meanwhile, and comes back in `close`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.longest_piece = 0  # where the prompt is read by `read_prompt`: tokens of a piece
        self.after_prompt: Tensor | None = None  # (b, v), once it is read: what forward says first
        self._seen: tuple[int, int] | None = None
        self._step: Callable[[Tensor], Tensor] | None = None
        self._graph: GraphStep | None = None
        self._cache: MambaCache | None = None
        self._steps = 0

    def logits(self, tokens: Tensor, cache: MambaCache) -> Tensor | None:
        """(b, v) logits of (b,) tokens, the cache brought up to date; None: the model's forward must do it."""
        if self.after_prompt is not None:
            logits, self.after_prompt = self.after_prompt, None
            return logits
        place = cache.conv_states.data_ptr(), cache.ssm_states.data_ptr()
        if place != self._seen:
            self.close()
            self._seen, self._step = place, None
            return None
        if self._step is None:
            self._step = self._made(cache)
        return None if self._step is None else self._step(tokens)

    def _made(self, cache: MambaCache) -> Callable[[Tensor], Tensor] | None:
        if self.model.device.type == "cuda":
            if not graphs_serve(self.model):
                return None
            self._graph, self._cache, self._steps = graph_step(self.model, cache.max_batch_size), cache, 0
            self._graph.load(cache)
            return self._replay
        return native_step(self.model, cache) if native_serves(self.model, cache) else None

    def _replay(self, tokens: Tensor) -> Tensor:
        assert self._graph is not None
        self._graph.tokens.copy_(tokens)
        self._steps += 1
        return self._graph().clone()

    def close(self) -> None:
        """Bring the cache up to date."""
        if self._graph is not None and self._cache is not None and self._steps:
            self._graph.store(self._cache, self._steps)
        self._graph = self._cache = None


# Tokens between two looks at whether the rows have ended: a look waits for the card.
_UNSEEN = 16


def greedy_tokens(
    model: Any, cache: MambaCache, first: Tensor, most: int, ends: Tensor | None, padding: int = 0
) -> Tensor:
    """(b, m) most probable tokens, m <= ``most``: (b,) ``first`` and those after it, until every row has had one of ``ends``.

    What follows a row's end is ``padding``. The cache, which holds what comes before ``first``, is left holding all tokens
    but the last.
    """
    if model.device.type != "cuda":
        return _greedy_by_steps(token_step(model, cache), first, most, ends, padding)
    tokens = _greedy_on_gpu(model, cache, first, most, ends)
    if ends is None:
        return tokens
    is_end = torch.isin(tokens, ends)
    return tokens.masked_fill(is_end.cumsum(1) > is_end.long(), padding)


def _greedy_by_steps(
    step: Callable[[Tensor], Tensor], first: Tensor, most: int, ends: Tensor | None, padding: int
) -> Tensor:
    tokens, token = [first], first
    ended = torch.zeros_like(first, dtype=torch.bool)
    for _ in range(most - 1):
        if ends is not None:
            ended = ended | torch.isin(token, ends)
            if bool(ended.all()):
                break
        token = step(token).argmax(-1)
        if ends is not None:
            token = token.masked_fill(ended, padding)
        tokens.append(token)
    return torch.stack(tokens, 1)


def _greedy_on_gpu(model: Any, cache: MambaCache, first: Tensor, most: int, ends: Tensor | None) -> Tensor:
    graph = graph_step(model, first.shape[0])
    graph.load(cache)
    graph.tokens.copy_(first)
    tokens = first[:, None]
    ended = None if ends is None else torch.isin(first, ends)
    while tokens.shape[1] < most and (ended is None or not bool(ended.all())):
        count = min(most - tokens.shape[1], graph.capacity if ended is None else _UNSEEN)
        before = None if ended is None or ends is None else (graph.cache.clone(), graph.tokens.clone())
        graph.position.zero_()
        for _ in range(count):
            graph()
        new = graph.history[:, :count].clone()
        if before is not None and ended is not None and ends is not None:
            so_far = torch.isin(new, ends).cummax(1).values | ended[:, None]  # (b, count)
            used = min(count, int((~so_far.all(0)).sum()) + 1)  # the first column at which all have ended
            if used < count:  # the state has gone too far: again from before
                graph.load(before[0])
                graph.tokens.copy_(before[1])
                for _ in range(used):
                    graph()
            new, ended = new[:, :used], so_far[:, used - 1]
        tokens = torch.cat([tokens, new], 1)
    graph.store(cache, tokens.shape[1] - 1)
    return tokens
