"""The implicit attention of a Mamba layer (arXiv 2403.01590, equation 10): what each token reads of each earlier one.

Unrolled, the recurrence of a channel is a lower triangular matrix over its inputs,

    y_t = sum_{s <= t} alpha_ts u_s + D u_t,   alpha_ts = sum_n C_tn exp(A_n (delta_{s+1} + ... + delta_t)) delta_s B_sn

It is formed some rows at a time. Between a block of rows and the keys before it the decay is a product of two factors
that are at most 1, the one from the key to the block's start and the one from there to the row: a matrix product over
n. Only within the block an exponential is formed for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 128


def implicit_attention(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The whole matrix of one channel.

    Args:
        delta: (l,) step sizes. A: (n,). B, C: (l, n).

    Returns:
        alpha (l, l), 0 above the diagonal.
    """
    whole = delta.new_zeros(len(delta), len(delta))
    for start, rows in attention_rows(delta, A, B, C):
        whole[start : start + len(rows), : rows.shape[1]] = rows
    return whole


def attention_rows(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, rows: int = _ROWS) -> Iterator[tuple[int, Tensor]]:
    """`implicit_attention` in blocks of rows: (first row t, alpha (r, t + r) of rows t, ..., t + r - 1)."""
    passed = delta.double().cumsum(0)  # float32 sums of thousands of steps would round the differences below
    weighted = delta[:, None] * B  # (l, n)
    for start in range(0, len(delta), rows):
        stop = min(len(delta), start + rows)
        own = passed[start:stop]
        block = delta.new_zeros(stop - start, stop)
        if start:
            edge = passed[start - 1]
            left = C[start:stop] * torch.exp(A * (own - edge).to(A.dtype)[:, None])  # (r, n)
            right = weighted[:start] * torch.exp(A * (edge - passed[:start]).to(A.dtype)[:, None])  # (t, n)
            block[:, :start] = left @ right.T
        apart = (own[:, None] - own[None, :]).to(A.dtype).clamp(min=0)  # (r, r); above the diagonal anything
        decays = torch.exp(apart[..., None] * A)  # (r, r, n)
        block[:, start:] = torch.einsum("tn,tsn,sn->ts", C[start:stop], decays, weighted[start:stop]).tril()
        yield start, block
