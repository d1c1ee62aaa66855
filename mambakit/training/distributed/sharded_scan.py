"""How the tokens of one shard change a state that passes through them, and the scan that starts from that state.

The recurrence is linear in the state, so a shard of tokens 1..T maps its initial state h_0 to its final state h_T by
two (b, d, n) tensors, and the gradient in the other direction by the same decay:

    h_T = decay h_0 + state        decay = exp(A S_T),  state    = sum_t exp(A (S_T - S_t)) delta_t B_t u_t
    g_0 = decay g_T + gradient                          gradient = sum_t exp(A S_t) C_t dy_t

with S_t = delta_1 + ... + delta_t (arXiv 2312.00752, equation 2, unrolled). Each sum starts at the end where its
exponentials are largest, and stops where all of them are below 2^-64 in float32, which keeps 24 bits, or exactly 0 in
float64: a shard much longer than the model's memory costs a fraction of a scan.

This is the plain PyTorch form; on a GPU the scan's own kernels compute the same pair
(`mambakit/ops/selective_scan/cuda_split_scan.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.selective_scan import cuda_split_scan

# Elements of (b, t, d, n) held at once: 64 MiB of float32.
_CHUNK_ELEMENTS = 2**24


def _vanishing_exponent(dtype: torch.dtype) -> float:
    """Below this exponent, exp does not change a sum in ``dtype``: 0 in float64, 2^-64 in float32."""
    return -746.0 if dtype == torch.float64 else -44.36


def shard_carry(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(decay, state)``, both (b, d, n): a shard maps its initial state h to ``decay * h + state``.

    Args:
        u, delta (b, l, d), A (d, n), B (b, l, n), delta_bias (d,): as in `mambakit.ops.selective_scan`.
        start: () integer; only tokens from here on count (where the last of several packed sequences begins).

    Returns:
        float32 (float64 for float64). ``decay`` is of the tokens that count.
    """
    dtype = A.dtype
    b, length, d = u.shape
    state = A.new_zeros(b, d, A.shape[1])
    after = A.new_zeros(b, d)  # the sum of delta over the chunks to the right
    for stop in range(length, 0, -_chunk(b, A)):
        part = slice(max(0, stop - _chunk(b, A)), stop)
        step = _steps(delta[:, part], delta_bias, delta_softplus, dtype)
        if start is not None:
            step = step * (torch.arange(part.start, stop, dtype=torch.int64, device=u.device) >= start)[:, None]
        within = step.flip(1).cumsum(1).flip(1)  # (b, t, d), this token to the chunk's end
        later = after[:, None] + F.pad(within[:, 1:], (0, 0, 0, 1))
        state += _weighted(later, A, step * u[:, part].to(dtype), B[:, part].to(dtype))
        after = after + within[:, 0]
        if _vanished(after, A):
            return torch.zeros_like(state), state
    return torch.exp(after[..., None] * A), state


def shard_carry_gradient(
    dy: Tensor, delta: Tensor, A: Tensor, C: Tensor, z: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(b, d, n): the gradient that the outputs' gradient ``dy`` (b, l, d) has in the initial state of the shard.

    ``z`` is the gate, as in `mambakit.ops.selective_scan`; only tokens before ``end`` (), where the first of several
    packed sequences ends, count.
    """
    dtype = A.dtype
    b, length, d = dy.shape
    gradient = A.new_zeros(b, d, A.shape[1])
    before = A.new_zeros(b, d)
    for begin in range(0, length, _chunk(b, A)):
        part = slice(begin, min(length, begin + _chunk(b, A)))
        step = _steps(delta[:, part], delta_bias, delta_softplus, dtype)
        weight = dy[:, part].to(dtype)
        if z is not None:
            weight = weight * F.silu(z[:, part].to(dtype))
        if end is not None:
            weight = weight * (torch.arange(begin, part.stop, dtype=torch.int64, device=dy.device) < end)[:, None]
        until = before[:, None] + step.cumsum(1)
        gradient += _weighted(until, A, weight, C[:, part].to(dtype))
        before = until[:, -1]
        if _vanished(before, A):
            break
    return gradient


def two_phase_scan(u: Tensor, A: Tensor) -> tuple[type, type]:
    """The `Forward` and `Backward` of this scan: those of `cuda_split_scan` where it serves, else those below."""
    return (cuda_split_scan.Forward, cuda_split_scan.Backward) if cuda_split_scan.serves(u, A) else (Forward, Backward)


class Forward:
    """As `cuda_split_scan.Forward`, in plain PyTorch: `shard_carry`, then the whole scan."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval):
        self._given = u, delta, A, B, C, D, z, delta_bias, delta_softplus
        self._cu_seqlens, self._interval = cu_seqlens, interval
        start = None if cu_seqlens is None else cu_seqlens[-2]
        self.decay, self.state = shard_carry(u, delta, A, B, delta_bias, delta_softplus, start)
        if cu_seqlens is not None and cu_seqlens.shape[0] > 2:
            self.decay = torch.zeros_like(self.decay)  # a sequence begins inside the shard: no state passes through

    def finish(self, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mambakit.selective_scan(*self._given, initial, self._cu_seqlens, self._interval)


class Backward:
    """As `cuda_split_scan.Backward`, in plain PyTorch: `shard_carry_gradient`, then the whole gradient."""

    def __init__(
        self, dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
    ):  # fmt: skip
        self._dy = dy
        self._given = (
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
        )  # fmt: skip
        end = None if cu_seqlens is None else cu_seqlens[1]
        self.gradient = shard_carry_gradient(dy, delta, A, C, z, delta_bias, delta_softplus, end)

    def finish(self, dfinal: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.mambakit.selective_scan_backward(self._dy, dfinal, *self._given)


def _chunk(b: int, A: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, b * A.numel()))


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    raw = delta.to(dtype) if bias is None else delta.to(dtype) + bias
    return F.softplus(raw) if softplus else raw


def _weighted(sums: Tensor, A: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    """sum_t exp(A sums_t) weight_t value_t: (b, t, d), (d, n), (b, t, d), (b, t, n) -> (b, d, n)."""
    return (torch.exp(sums[..., None] * A) * weight[..., None] * value[:, :, None]).sum(1)


def _vanished(sums: Tensor, A: Tensor) -> bool:
    """Whether exp(A sums) is negligible everywhere, and so are the terms farther away."""
    return sums.numel() > 0 and float((sums * A.amax(1)).max()) < _vanishing_exponent(A.dtype)
