"""Decode steps under transformers' own token loop: what `generate` and the model's forward share during one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.drafted_batch import Drafting
from mambakit.decoding.slots import SlotPool
from mambakit.modules import StateCache


class TransformersSteps:
    """The state of one `generate` call. `prepare_inputs_for_generation` passes it to forward, which asks it for each
    token's logits.

    A decoder is tied to the tensors of one cache. It is made at the second token with the same cache tensors, and used
    as long as they stay. A beam search replaces them at every token, so it never uses a decoder. On a GPU the states
    are in the CUDA graph's own memory meanwhile; `close` copies them back.

    Attributes:
        cached_columns: the number of leading prompt columns that the cache has read.
        chunk_size: of the prefill, which starts after `generate` has checked its arguments; 0: forward reads the
            prompt.
        prompt_logits: (b, v) after the prefill; forward returns them first instead of reading the prompt.
        own_cache: the cache that was made for this call, which nobody else uses.
        seeds: one per text, for counter-based random numbers; None: the global generator.
        drafting: how the call drafts; None: it does not.
    """

    def __init__(self, model: Any, seeds: Sequence[int] | None = None, drafting: Drafting | None = None):
        self.model, self.seeds, self.drafting = model, seeds, drafting
        self.cached_columns = self.chunk_size = 0
        self.prompt_logits: Tensor | None = None
        self.own_cache: StateCache | None = None
        self._seen: tuple[Any, ...] | None = None
        self._pool: SlotPool | None = None

    def logits(self, ids: Tensor | None, cache: StateCache | None) -> Tensor | None:
        """(b, v) logits of (b, 1) tokens, with the cache updated. None: the caller must run the model's forward."""
        if ids is None or cache is None or ids.shape[1] != 1:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a trace must record the forward
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
            self.close()  # a hook was added after a graph had read some tokens
            return None
        logits = self._pool.step(ids[:, 0])
        return logits.clone() if logits.is_cuda else logits  # a graph overwrites its logits at the next step

    def close(self) -> None:
        """Update the cache."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None
