"""Draft verification on a GPU by Triton's kernels for many rows, as two CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import CapturedGraph
from mambakit.decoding.graph_step import many_rows_verification, why_not_many_rows
from mambakit.decoding.transfers import integers
from mambakit.decoding.verify import require_read


def why_not_verify_rows(model: Any, rows: int, tokens: int, *, states: Any = None) -> str | None:
    """Why `ManyRowsVerifier` cannot verify drafts of ``tokens`` tokens of ``rows`` rows, or None where it can."""
    return why_not_many_rows(model, rows * tokens, states=states)


class ManyRowsVerifier:
    """All rows' drafts in one pass over the weights. Shorter drafts are padded, and only they are kept."""

    holds_model = False

    @torch.no_grad()
    def __init__(self, model: Any, cache: Any, tokens: int):
        self._cache, self._read = cache, 0
        self._step = many_rows_verification(model, cache, tokens)
        self.tokens = self._step.tokens.view(cache.max_batch_size, tokens)
        self.kept = self._step.kept
        self._logits = self._step.logits.view(cache.max_batch_size, tokens, -1)
        self._verifying = CapturedGraph(self._step, model.device, warm_ups=1)
        self._replaying = CapturedGraph(self._step.commit, model.device, warm_ups=1)  # of 0 tokens

    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = tokens.shape[1]
        self.tokens[:, : self._read] = tokens
        self._verifying.replay()
        return self._logits[:, : self._read]

    def commit(self, kept: Sequence[int]) -> None:
        require_read(kept, self._read)
        self._read = 0
        self.kept.copy_(integers(self.kept.device, kept))
        self._replaying.replay()
        self._cache.advance(max(kept))

    def launch(self, model: Any) -> Tensor:
        self._step()
        return self._logits

    def advance(self) -> None:
        self._step.commit()

    def hold(self) -> None:
        """The kernels read the cache's own memory."""

    def reload(self) -> None:
        self._read = 0
