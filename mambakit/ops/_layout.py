"""The two layouts of a (b, l, d) operand: channels last, and a transposed view of (b, d, l) memory.

Code written for other packages keeps its activations as (b, d, l). Their transposed views are read and written where
they are, by strides; a result has the layout of the operand that it belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_transposed(x: Tensor) -> bool:
    """Whether ``x`` (b, l, d) has its tokens adjacent in memory, and not its channels."""
    return x.shape[1] > 1 and x.shape[2] > 1 and x.stride(1) == 1 and x.stride(2) > 1


def empty_as(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Dense memory for a result of the shape and in the layout of ``x`` (b, l, d)."""
    b, length, d = x.shape
    if is_transposed(x):
        return x.new_empty((b, d, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((b, length, d), dtype=dtype)


def dense_as(values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` (b, l, d), dense, in the layout of ``x`` and its dtype or another."""
    values = values.to(dtype or x.dtype)
    if is_transposed(x):
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values.contiguous()
