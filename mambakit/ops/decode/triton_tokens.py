"""A decode step's first and last kernel in Triton: the embedding, and the greedy choice of the next token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(
    best, best_token, tokens, history, position, capacity,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The most probable token of each row: tokens (rows,), and history (rows, capacity) at position[0]."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    values = tl.load(best + b * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
    numbers = tl.load(best_token + b * BLOCKS + i, mask=i < BLOCKS, other=2147483647)
    token = tl.min(tl.where(values == tl.max(values, axis=0), numbers, 2147483647), axis=0).to(tl.int64)
    token = tl.where(token < 2147483647, token, 0)  # of NaN logits: a token that has an embedding
    tl.store(tokens + b, token)
    at = tl.load(position) - 1  # _embed has counted this step
    tl.store(history + b * capacity + at, token, mask=at < capacity)


@triton.jit
def _embed(tokens, embeddings, residual, position, H: tl.constexpr, SIZE: tl.constexpr):
    """residual (rows, H) float32 from the tokens; one more position."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    token = tl.load(tokens + b)
    value = tl.load(embeddings + token * H + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(residual + b * H + i, value, mask=i < H)
    if b == 0:
        tl.store(position, tl.load(position) + 1)


class TokenBuffers:
    """A step's inputs and outputs, in buffers that a CUDA graph can capture.

    Attributes:
        tokens: (rows,) int64, what the step reads; after `choose` the most probable token of each row. history: (rows,
        capacity) int64; step i (``position`` (1,) int64 counts them) writes its choice to ``history[:, i]``. logits:
        (rows, v) float32. best, best_token: (rows, blocks) float32 and int32, each head program's largest logit and its
        first token.
    """

    def __init__(self, rows: int, v: int, blocks: int, capacity: int, device: torch.device):
        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.tokens, self.position = buffer(rows), buffer(1)
        self.history = buffer(rows, max(1, capacity))
        self.logits = buffer(rows, v, dtype=torch.float32)
        self.best, self.best_token = buffer(rows, blocks, dtype=torch.float32), buffer(rows, blocks, dtype=torch.int32)

    def embed(self, embeddings: Tensor, residual: Tensor) -> None:
        """residual (rows, h) float32 from the tokens; a step begins."""
        rows, h = residual.shape
        _embed[(rows,)](self.tokens, embeddings, residual, self.position, h, triton.next_power_of_2(h))

    def choose(self) -> None:
        rows, blocks = self.best.shape
        _choose[(rows,)](
            self.best, self.best_token, self.tokens, self.history, self.position, self.history.shape[1],
            blocks, triton.next_power_of_2(blocks),
        )  # fmt: skip
