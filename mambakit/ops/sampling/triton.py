"""Sampling on a GPU, in Triton: one CTA a row and one launch for all rows, with no sort.

The vocabulary is walked in blocks, from L2 after the first time: once for the largest logit, once for the draw, and for
a filter 15 times more, in which a search over the bit patterns of w (of non-negative float32 numbers their order is the
order of the numbers) finds the threshold, two bits a pass. A lane of the block sums its own tokens; the draw picks a
lane, then one of its tokens, so that no pass waits for a sum over the block. Sums have a fixed order, so a row's token
depends on the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.sampling.reference import LANES

_WARPS = 16  # of 8 to 32, and 2,048 to 8,192 lanes, the fastest on an H200: 19 us for 128 rows, top-p 137, typical 325


@triton.jit
def _weights(row, start, V: tl.constexpr, largest, scale, cut, LANES: tl.constexpr):
    """w = exp((logits - largest) / temperature) of one block where it is ``cut`` or more, else 0;

    ``scale`` is log2(e) / temperature.
    """
    i = start + tl.arange(0, LANES)
    x = tl.load(row + i, mask=i < V, other=float("-inf")).to(tl.float32)
    w = tl.exp2((x - largest) * scale)
    return tl.where((i < V) & (w >= cut), w, 0.0)


@triton.jit
def _distance(w, total, entropy):
    """Of each token's surprise from the entropy; infinite where a token is not kept."""
    return tl.where(w > 0, tl.abs(tl.log(total / tl.where(w > 0, w, 1.0)) - entropy), float("inf"))


@triton.jit
def _near(w, total, entropy, distance):
    """w where a token's surprise is within ``distance`` of the entropy."""
    return tl.where(_distance(w, total, entropy) <= distance, w, 0.0)


@triton.jit
def _measure(
    row, V: tl.constexpr, largest, scale, cut, wanted, entropy, total, t1, t2, t3,
    KIND: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Whether at least ``wanted`` tokens (KIND 0) or mass (1, 2) has a key of at least (2: at most) t1, t2, t3."""
    a = tl.zeros((LANES,), tl.float32)
    b = tl.zeros((LANES,), tl.float32)
    c = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES):
        w = _weights(row, start, V, largest, scale, cut, LANES)
        if KIND == 2:
            key = _distance(w, total, entropy).to(tl.int32, bitcast=True)
            a += tl.where(key <= t1, w, 0.0)
            b += tl.where(key <= t2, w, 0.0)
            c += tl.where(key <= t3, w, 0.0)
        else:
            key = w.to(tl.int32, bitcast=True)
            if KIND == 0:
                w = tl.where(start + tl.arange(0, LANES) < V, 1.0, 0.0)
            a += tl.where(key >= t1, w, 0.0)
            b += tl.where(key >= t2, w, 0.0)
            c += tl.where(key >= t3, w, 0.0)
    return tl.sum(a) >= wanted, tl.sum(b) >= wanted, tl.sum(c) >= wanted


@triton.jit
def _search(row, V: tl.constexpr, largest, scale, cut, wanted, entropy, total, KIND: tl.constexpr, LANES: tl.constexpr):
    """KIND 0, 1: the largest key at and above which there is enough; KIND 2: the smallest at and below which there is.
    Keys are the bits of a float32 number that is not negative."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), 0x7F800000 if KIND == 2 else 0x3F800001, tl.int64)  # infinity: everything; just above 1: nothing
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        t1 = low + step
        t2 = tl.minimum(low + 2 * step, high)
        t3 = tl.minimum(low + 3 * step, high)
        e1, e2, e3 = _measure(
            row, V, largest, scale, cut, wanted, entropy, total,
            t1.to(tl.int32), t2.to(tl.int32), t3.to(tl.int32), KIND, LANES,
        )  # fmt: skip
        if KIND == 2:  # enough at or below: the key is there or lower
            new_high = tl.where(e1, t1, tl.where(e2, t2, tl.where(e3, t3, high)))
            low = tl.where(e1, low, tl.where(e2, t1, tl.where(e3, t2, t3)))
        else:
            new_high = tl.where(~e1, t1, tl.where(~e2, t2, tl.where(~e3, t3, high)))
            low = tl.where(~e1, low, tl.where(~e2, t1, tl.where(~e3, t2, t3)))
        high = tl.maximum(new_high, low)
    found = high if KIND == 2 else low
    return found.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _mass(row, V: tl.constexpr, largest, scale, cut, LANES: tl.constexpr):
    """The sum of the w that are kept."""
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES):
        sums += _weights(row, start, V, largest, scale, cut, LANES)
    return tl.sum(sums)


@triton.jit
def _entropy(row, V: tl.constexpr, largest, scale, cut, total, LANES: tl.constexpr):
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES):
        w = _weights(row, start, V, largest, scale, cut, LANES)
        sums += tl.where(w > 0, w * tl.log(total / tl.where(w > 0, w, 1.0)), 0.0)
    return tl.sum(sums) / total


@triton.jit
def _draw(
    row, V: tl.constexpr, largest, scale, cut, total, entropy, distance, uniform,
    TYPICAL: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The first token, lane after lane, at which the sum of w exceeds ``uniform`` times that of all."""
    lanes = tl.arange(0, LANES)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES):
        w = _weights(row, start, V, largest, scale, cut, LANES)
        if TYPICAL:
            w = _near(w, total, entropy, distance)
        sums += w
    ends = tl.cumsum(sums.to(tl.float64), 0)
    target = uniform * tl.max(ends)
    # Should rounding leave no lane or no token, the last one that has a part in the sum.
    last = tl.max(tl.where(sums > 0, lanes, 0))
    lane = tl.minimum(tl.min(tl.where((ends > target) & (sums > 0), lanes, LANES)), last)
    before = tl.max(tl.where(lanes < lane, ends, 0.0))
    steps = tl.arange(0, DEPTH)
    i = lane + steps * LANES
    x = tl.load(row + i, mask=i < V, other=float("-inf")).to(tl.float32)
    w = tl.exp2((x - largest) * scale)
    w = tl.where((i < V) & (w >= cut), w, 0.0)
    if TYPICAL:
        w = _near(w, total, entropy, distance)
    inside = before + tl.cumsum(w.to(tl.float64), 0)
    last = tl.max(tl.where(w > 0, steps, 0))
    step = tl.minimum(tl.min(tl.where((inside > target) & (w > 0), steps, DEPTH)), last)
    return lane + step * LANES


@triton.jit
def _sample(logits, row_stride, uniform, parameters, tokens, V: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * row_stride
    lanes = tl.arange(0, LANES)
    best = tl.full((LANES,), float("-inf"), tl.float32)
    at = tl.full((LANES,), 2147483647, tl.int32)
    bad = tl.zeros((LANES,), tl.int32)
    for start in range(0, V, LANES):
        i = start + lanes
        x = tl.load(row + i, mask=i < V, other=float("-inf")).to(tl.float32)
        bad = bad | (x != x).to(tl.int32)
        at = tl.where(x > best, i, at)
        best = tl.where(x > best, x, best)
    largest = tl.max(best)
    token = tl.min(tl.where(best == largest, at, 2147483647))
    temperature = tl.load(parameters + b * 6)
    no_token = (tl.max(bad) > 0) | (largest == float("-inf"))
    if no_token | ((largest == float("inf")) & (temperature != 0)):
        token = -1
    elif temperature != 0:
        scale = tl.minimum(
            1.4426950408889634 / temperature, 1e30
        )  # of the smallest temperatures: infinity times 0 is NaN
        top_k = tl.load(parameters + b * 6 + 1)
        top_p = tl.load(parameters + b * 6 + 2)
        min_p = tl.load(parameters + b * 6 + 3)
        typical_p = tl.load(parameters + b * 6 + 4)
        epsilon = tl.load(parameters + b * 6 + 5)
        number = tl.load(uniform + b)
        cut = 0.0
        if (top_k > 0) & (top_k < V):
            cut = _search(row, V, largest, scale, cut, top_k, 0.0, 1.0, 0, LANES)
        if top_p < 1:
            wanted = top_p * _mass(row, V, largest, scale, cut, LANES)
            cut = tl.maximum(cut, _search(row, V, largest, scale, cut, wanted, 0.0, 1.0, 1, LANES))
        cut = tl.maximum(cut, min_p)
        if typical_p < 1:
            total = _mass(row, V, largest, scale, cut, LANES)
            entropy = _entropy(row, V, largest, scale, cut, total, LANES)
            distance = _search(row, V, largest, scale, cut, typical_p * total, entropy, total, 2, LANES)
            if epsilon > 0:
                most = tl.zeros((LANES,), tl.float32)
                sums = tl.zeros((LANES,), tl.float32)
                for start in range(0, V, LANES):
                    w = _near(_weights(row, start, V, largest, scale, cut, LANES), total, entropy, distance)
                    most = tl.maximum(most, w)
                    sums += w
                cut = tl.maximum(cut, tl.minimum(tl.max(most), epsilon * tl.sum(sums)))
            token = _draw(row, V, largest, scale, cut, total, entropy, distance, number, True, LANES, DEPTH)
        else:
            if epsilon > 0:
                cut = tl.maximum(cut, tl.minimum(1.0, epsilon * _mass(row, V, largest, scale, cut, LANES)))
            token = _draw(row, V, largest, scale, cut, 1.0, 0.0, 0.0, number, False, LANES, DEPTH)
    tl.store(tokens + b, token.to(tl.int64))


def sample(logits: Tensor, uniform: Tensor, parameters: Tensor) -> Tensor:
    b, v = logits.shape
    tokens = torch.empty(b, dtype=torch.int64, device=logits.device)
    if b:
        depth = triton.next_power_of_2(triton.cdiv(v, LANES))
        _sample[(b,)](
            logits, logits.stride(0), uniform.contiguous(), parameters.contiguous(), tokens, v, LANES, depth,
            num_warps=_WARPS,
        )  # fmt: skip
    return tokens
