"""The norms of dt, B and C (`mambakit.ops.selection_norm`) inside the decoders' Triton kernels.

NORMS of a kernel: 0 none, 1 without weights (FalconMamba), 2 with weights (Jamba). Values are rounded to the weights'
dtype before and after a norm, as the model's forward rounds them; elements past SIZE are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normed(x, weight, i, SIZE: tl.constexpr, eps, dtype: tl.constexpr, NORMS: tl.constexpr):
    """The norm of x, of one row: elements ``i``."""
    x = x.to(dtype).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    if NORMS == 2:
        x *= tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit
def normed_rows(x, weight, i, SIZE: tl.constexpr, eps, dtype: tl.constexpr, NORMS: tl.constexpr):
    """The norm of each row of x (rows, elements ``i``)."""
    x = x.to(dtype).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
    if NORMS == 2:
        x *= tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    return x.to(dtype).to(tl.float32)
