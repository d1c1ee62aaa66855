"""`segment.py` on a GPU, in Triton: the same two sums, in stretches of tokens that run side by side.

Each stretch first sums its time steps. What lies between a stretch and the end that a sum belongs to then decides whether it
matters at all: where every exponential is below 2^-64 its program ends at once, before it has read anything. The others
walk their tokens away from that end, and their shares are added in order, so the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _step_sizes(raw, bias, SOFTPLUS: tl.constexpr):
    """delta + bias, through softplus = log1p(exp(x))."""
    raw = raw.to(tl.float32) + bias
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        # log1p(e) for e in (0, 1]: its series where adding e to 1 would round it away
        raw = tl.maximum(raw, 0.0) + tl.where(e < 1e-4, e * (1.0 - 0.5 * e), tl.log(1.0 + e))
    return raw


@triton.jit
def _sums_kernel(
    delta, bias, edge, sums, length, d, stride_b, stride_t,
    T: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_START: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sums (b, S, d): the time steps of each stretch of T tokens, of the tokens from ``edge`` on."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.program_id(2)
    inside = channel < d
    delta += row.to(tl.int64) * stride_b + channel[None, :]
    shift = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=inside, other=0.0)
    first = 0
    if HAS_START:
        first = tl.load(edge).to(tl.int32)
    total = tl.zeros((ROWS, BD), tl.float32)
    for begin in range(0, T, ROWS):
        t = part * T + begin + tl.arange(0, ROWS)
        there = ((t >= first) & (t < length))[:, None] & inside[None, :]
        raw = tl.load(delta + t.to(tl.int64)[:, None] * stride_t, mask=there, other=0.0)
        total += tl.where(there, _step_sizes(raw, shift[None, :], SOFTPLUS), 0.0)
    place = (row.to(tl.int64) * tl.num_programs(0) + part) * d + channel
    tl.store(sums + place, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _share_kernel(
    x, delta, A, V, z, bias, edge, between, shares, length, d, n,
    x_b, x_t, delta_b, delta_t, V_b, V_t, z_b, z_t,
    T: tl.constexpr, BACKWARD: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_EDGE: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """shares (b, S, d, n): what each stretch adds. ``between`` (b, S, d): the time steps between it and the sum's end.

    Forward x is u and V is B, and the walk is from the last token to the first; BACKWARD x is dy and V is C, and the walk is
    from the first to the last.
    """
    part = tl.program_id(0)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.program_id(2).to(tl.int64)
    state = tl.arange(0, BN)
    inside = channel < d
    both = inside[:, None] & (state < n)[None, :]
    # exp(x) = 2^(x log2(e)), the hardware's form
    rate = tl.load(A + channel[:, None] * n + state[None, :], mask=both, other=0.0) * 1.4426950408889634
    place = (row * tl.num_programs(0) + part) * d + channel
    away = tl.load(between + place, mask=inside, other=0.0)  # (BD,)
    share = tl.zeros((BD, BN), tl.float32)
    x += row * x_b + channel
    delta += row * delta_b + channel
    V += row * V_b + state
    if HAS_Z:
        z += row * z_b + channel
    if tl.max(tl.where(both, rate * away[:, None], -1.0e30)) >= -64.0:
        shift = tl.zeros((BD,), tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + channel, mask=inside, other=0.0)
        if HAS_EDGE:
            limit = tl.load(edge).to(tl.int32)
        for i in range(T):
            t = part * T + i if BACKWARD else part * T + T - 1 - i
            at = t.to(tl.int64)
            there = inside & (t < length)
            weight = tl.load(x + at * x_t, mask=there, other=0.0).to(tl.float32)
            value = tl.load(V + at * V_t, mask=(state < n) & (t < length), other=0.0).to(tl.float32)
            step = _step_sizes(tl.load(delta + at * delta_t, mask=there, other=0.0), shift, SOFTPLUS)
            if BACKWARD:
                away += step
                if HAS_Z:
                    gate = tl.load(z + at * z_t, mask=there, other=0.0).to(tl.float32)
                    weight *= gate * tl.sigmoid(gate)
                if HAS_EDGE:
                    weight = tl.where(t < limit, weight, 0.0)
                share += tl.exp2(rate * away[:, None]) * (weight[:, None] * value[None, :])
            else:
                counts = t < length
                if HAS_EDGE:
                    counts = counts & (t >= limit)
                step = tl.where(counts, step, 0.0)
                share += tl.exp2(rate * away[:, None]) * ((weight * step)[:, None] * value[None, :])
                away += step
    tl.store(shares + place[:, None] * n + state[None, :], share, mask=both)


def segment_map(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mambakit.training.distributed.segment.segment_map`."""
    sums, T = _sums(delta, delta_bias, delta_softplus, start)
    after = torch.zeros_like(sums)  # each stretch's tokens to the right
    after[:, :-1] = sums[:, 1:].flip(1).cumsum(1).flip(1)
    state = _shares(u, delta, A, B, None, delta_bias, delta_softplus, start, after, T, backward=False)
    return torch.exp(sums.sum(1)[..., None] * A), state


def segment_gradient(
    dy: Tensor, delta: Tensor, A: Tensor, C: Tensor, z: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`mambakit.training.distributed.segment.segment_gradient`."""
    sums, T = _sums(delta, delta_bias, delta_softplus, None)
    before = torch.zeros_like(sums)  # each stretch's tokens to the left
    before[:, 1:] = sums[:, :-1].cumsum(1)
    return _shares(dy, delta, A, C, z, delta_bias, delta_softplus, end, before, T, backward=True)


def _sums(delta: Tensor, bias: Tensor | None, softplus: bool, start: Tensor | None) -> tuple[Tensor, int]:
    """The time steps of each stretch, (b, S, d) float32, and the stretch's length: at most 128 of 64 tokens or more."""
    b, length, d = delta.shape
    T = max(64, triton.next_power_of_2(triton.cdiv(length, 128)))
    delta = _channels_adjacent(delta)
    sums = torch.empty(b, triton.cdiv(length, T), d, dtype=torch.float32, device=delta.device)
    with torch.cuda.device_of(delta):
        _sums_kernel[(sums.shape[1], triton.cdiv(d, 64), b)](
            delta, bias, start, sums, length, d, *delta.stride()[:2],
            T=T, HAS_BIAS=bias is not None, SOFTPLUS=softplus, HAS_START=start is not None, ROWS=32, BD=64, num_warps=4,
        )  # fmt: skip
    return sums, T


def _shares(x, delta, A, V, z, bias, softplus, edge, between, T, *, backward) -> Tensor:
    b, length, d = x.shape
    n = A.shape[1]
    x, delta, V = _channels_adjacent(x), _channels_adjacent(delta), _channels_adjacent(V)
    z = None if z is None else _channels_adjacent(z)
    BN = triton.next_power_of_2(n)
    BD = max(1, 512 // BN)  # 16 states of each kind a thread
    shares = torch.empty(b, between.shape[1], d, n, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _share_kernel[(between.shape[1], triton.cdiv(d, BD), b)](
            x, delta, A.contiguous(), V, z, bias, edge, between, shares, length, d, n,
            *x.stride()[:2], *delta.stride()[:2], *V.stride()[:2], *((0, 0) if z is None else z.stride()[:2]),
            T=T, BACKWARD=backward, HAS_Z=z is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus,
            HAS_EDGE=edge is not None, BD=BD, BN=BN, num_warps=1,
        )  # fmt: skip
    return shares.sum(1)


def _channels_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
