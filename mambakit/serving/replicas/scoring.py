"""Scoring at a replica: log-probabilities of prompts, and of continuations of one prefix, between the engine's steps.

Each task is read a part at a time, a layer of a chunk where the model allows that, and tasks take turns: a long one
delays neither the texts being written nor a short one.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.prefill import hidden_states_in_parts
from mambakit.generation.logprobs import score_alternatives
from mambakit.generation.reading import PromptReading
from mambakit.generation.token_ids import require_in_vocabulary
from mambakit.generation.token_scores import score_after
from mambakit.modules import StateCache
from mambakit.serving.messages import Continuation, Scored, Task
from mambakit.serving.replicas.states import ids_of

# Tokens of continuations in a forward: it runs to its end before the next token of any text.
_PACKED_TOKENS, _PACKED_BYTES = {"cpu": 128, "cuda": 2048}, 256 << 20


@dataclass(frozen=True)
class PromptScores:
    """A scored prompt.

    Attributes:
        scored: a log-probability for each token; None for a first one that follows nothing.
        state: after all tokens of the prompt but the last.
    """

    scored: tuple[Scored, ...]
    state: StateCache


@dataclass(frozen=True)
class ContinuationScores:
    """Scored continuations, and how many tokens of their prefix were in the prefix cache."""

    scores: tuple[Continuation, ...]
    cached_tokens: int


class Scorer:
    """Scores tasks in turn.

    Args:
        model: a causal language model in eval mode.
        chunk_size: prompt tokens per forward.
        seconds: how long a step lasts; one part is read at least.
        prefix_cache: where prefixes of continuations are looked up.
    """

    def __init__(self, model: Any, chunk_size: int, seconds: float = 0.02, prefix_cache: Any = None):
        self._model, self._chunk_size, self._seconds = model, chunk_size, seconds
        self.prefix_cache = prefix_cache
        self._running: deque[tuple[Any, Generator[None, None, Any]]] = deque()

    def __len__(self) -> int:
        return len(self._running)

    def add(self, owner: Any, task: Task, state: StateCache | None, unread: Tensor) -> None:
        """Begin a task.

        Args:
            owner: what `step` names it by.
            state: that its prompt follows, of one row; it is not changed. None: zeros.
            unread: (u,) int64, tokens between the state and the prompt, which the state has not read.
        """
        ids = ids_of(array("q", task.prompt_ids))
        require_in_vocabulary("prompt", ids, self._model.config.vocab_size)
        parts: Generator[None, None, Any]
        if task.options.continuations is not None:
            parts = self._continuations(task, torch.cat([unread, ids]), state)
        else:
            parts = self._prompt(task, ids, state, unread)
        self._running.append((owner, parts))

    def cancel(self, owner: Any) -> None:
        """Drop a task."""
        self._running = deque(one for one in self._running if one[0] != owner)

    @torch.no_grad()
    def step(self, done: Callable[[Any, Any], None], failed: Callable[[Any, Exception], None]) -> None:
        """Read parts of tasks for a while.

        Args:
            done: called with an owner and its `PromptScores` or `ContinuationScores`.
            failed: called with an owner and why its task cannot be scored.
        """
        end = time.perf_counter() + self._seconds
        while self._running:
            owner, parts = self._running.popleft()
            try:
                next(parts)
            except StopIteration as result:
                done(owner, result.value)
            except Exception as error:
                failed(owner, error)
            else:
                self._running.append((owner, parts))
            if time.perf_counter() >= end:
                return

    def _prompt(
        self, task: Task, ids: Tensor, state: StateCache | None, unread: Tensor
    ) -> Generator[None, None, PromptScores]:
        model, top = self._model, min(task.options.log_probs or 0, self._model.config.vocab_size)
        cache = model.backbone.new_cache(1) if state is None else state.clone()
        inputs, targets = torch.cat([unread, ids])[:-1].to(model.device), (ids if len(unread) else ids[1:])
        targets = targets.to(model.device)
        scored = [] if len(unread) else [Scored(int(ids[0]), None)]
        at = -max(0, len(unread) - 1)  # the first of those tokens are predicted by nothing that is asked
        for hidden in hidden_states_in_parts(model, inputs, cache, self._chunk_size):
            if hidden is None:
                yield
                continue
            hidden, at = hidden[max(0, -at) :], at + min(len(hidden), max(0, -at))
            for found in score_alternatives(model, hidden, targets[at : at + len(hidden)], top):
                rows = zip(*(column.tolist() for column in found), strict=True)
                scored += [Scored(token, p, 0, tuple(zip(*best, strict=True))) for token, p, *best in rows]
                yield
            at += len(hidden)
        return PromptScores(tuple(scored), cache)

    def _continuations(
        self, task: Task, ids: Tensor, state: StateCache | None
    ) -> Generator[None, None, ContinuationScores]:
        model = self._model
        reading = PromptReading(model, ids, self._chunk_size, state, self.prefix_cache)
        while not reading.done:
            reading.part()
            yield
        assert reading.cache is not None
        assert reading.logits is not None
        assert task.options.continuations is not None
        texts = [torch.frombuffer(bytearray(one), dtype=torch.int64) for one in task.options.continuations]
        for tokens in texts:
            require_in_vocabulary("a continuation", tokens, model.config.vocab_size)
        found: list[Continuation] = []
        groups = score_after(
            model, reading.cache, reading.logits[0].float(), texts,
            most_tokens=_PACKED_TOKENS[model.device.type], most_rows=max(1, _PACKED_BYTES // reading.cache.nbytes),
        )  # fmt: skip
        for group in groups:
            found += [
                Continuation(array("f", scores.log_probs.tolist()).tobytes(), bool(scores.likeliest.all()))
                for scores in group
            ]
            yield
        return ContinuationScores(tuple(found), reading.cached)
