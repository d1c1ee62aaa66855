"""The other loop over tokens is transformers': what `generate` and forward say to each other when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.slots import SlotPool
from mambakit.modules import StateCache


class TransformersSteps:
    """One `generate` call. `prepare_inputs_for_generation` passes it to forward, which asks it for each token's logits.

    A step is made for a cache's own tensors. They stay in place while slots go on side by side, so the second token against the same
    tensors makes the step and later ones use it; a beam search, which moves rows at every token, never does. On a GPU the state
    moves into the graph's own memory meanwhile, and comes back in `close`.

    Attributes:
        cached_columns: leading columns of the prompt that the cache has read.
        chunk_size: of a prompt that is read once `generate` has checked everything; 0 where it is not read like that.
        prompt_logits: (b, v) after the prompt, once it is read; forward then need not read it, and says these first.
        own_cache: the cache that was made for this call: nobody else sees it.
        seeds: one for each text, of counter-based random numbers; None: those of the global generator.
    """

    def __init__(self, model: Any, seeds: Sequence[int] | None = None):
        self.model, self.seeds = model, seeds
        self.cached_columns = self.chunk_size = 0
        self.prompt_logits: Tensor | None = None
        self.own_cache: StateCache | None = None
        self._seen: tuple[Any, ...] | None = None
        self._pool: SlotPool | None = None

    def logits(self, ids: Tensor | None, cache: StateCache | None) -> Tensor | None:
        """(b, v) logits of (b, 1) tokens, the cache brought up to date; None: the model's forward must do it."""
        if ids is None or cache is None or ids.shape[1] != 1:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a trace is of the forward
            return None
        if self.prompt_logits is not None:
            logits, self.prompt_logits = self.prompt_logits, None
            return logits
        place = cache.addresses()
        if place != self._seen:
            self.close()
            self._seen = place
            return None
        if self._pool is None:
            self._pool = SlotPool(self.model, cache.max_batch_size, cache, called=True)
        if self._pool.by_forward:
            self.close()  # a graph may have read some tokens before somebody put a hook on a module
            return None
        logits = self._pool.step(ids[:, 0])
        return logits.clone() if logits.is_cuda else logits  # a graph's are gone with the next step

    def close(self) -> None:
        """Bring the cache up to date."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None
