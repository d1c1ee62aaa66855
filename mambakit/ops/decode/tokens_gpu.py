"""A step's two ends on a GPU, in Triton: tokens to the residual stream, and the best of each block of logits to the next token."""

import triton
import triton.language as tl


@triton.jit
def choose_kernel(
    best, best_token, tokens, history, position, capacity,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The most probable token of each row: tokens (rows,), and history (rows, capacity) at position[0]."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    values = tl.load(best + b * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
    numbers = tl.load(best_token + b * BLOCKS + i, mask=i < BLOCKS, other=2147483647)
    token = tl.min(tl.where(values == tl.max(values, axis=0), numbers, 2147483647), axis=0).to(tl.int64)
    tl.store(tokens + b, token)
    at = tl.load(position) - 1  # embed_kernel has counted this step
    tl.store(history + b * capacity + at, token, mask=at < capacity)


@triton.jit
def embed_kernel(tokens, embeddings, residual, position, H: tl.constexpr, SIZE: tl.constexpr):
    """residual (rows, H) float32 from the tokens; one more position."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    token = tl.load(tokens + b)
    value = tl.load(embeddings + token * H + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(residual + b * H + i, value, mask=i < H)
    if b == 0:
        tl.store(position, tl.load(position) + 1)
