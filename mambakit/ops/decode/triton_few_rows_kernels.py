"""The Triton kernels of `triton_few_rows.py`, which says how they follow each other and launches them.

A product is a sum over columns for each row of the batch, in float32 without tensor cores. int8, int4
and fp8 weights are widened in registers as they are read.
"""

# A kernel's tuple of tensors grows by concatenation, the form Triton compiles; types there are Triton's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from mambakit.ops.decode.triton_norms import normed
from mambakit.ops.linear.triton_kernels import float_of_e4m3


@triton.jit
def _float_products(
    x, x_stride, norm, weight, n, n_mask, rows,
    K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, NORMED: tl.constexpr, STAGES: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of weight rows n and rows of x, and (BB,) sums of x^2; FLOAT8: of e4m3 without its scales."""
    b = tl.arange(0, BB)
    total = tl.zeros((BN, BB, BK), tl.float32)
    squares = tl.zeros((BB, BK), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        inside = k < K
        w = tl.load(
            weight + n[:, None].to(tl.int64) * K + k[None, :], mask=n_mask[:, None] & inside[None, :], other=0.0
        )
        values = tl.load(
            x + b[:, None] * x_stride + k[None, :], mask=(b < rows)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        wide = float_of_e4m3(w) if FLOAT8 else w.to(tl.float32)
        total += wide[:, None, :] * values[None, :, :]
    return tl.sum(total, axis=2), tl.sum(squares, axis=1)


@triton.jit
def _integer_products(
    x, x_stride, norm, weight, scales, n, n_mask, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of rows n of an int8 or int4 weight and rows of x, and (BB,) sums of x^2.

    Layouts: `mambakit.ops.linear.packed`.

    An integer becomes a float without a conversion: as the low bits of 2^23, which is then subtracted.
    """
    UNIT: tl.constexpr = 32 if BITS == 8 else 64  # columns packed together; an int8 unit has one scale
    WORDS: tl.constexpr = 32 if BITS == 8 else 16  # of a unit
    PARTS: tl.constexpr = 1 if BITS == 8 else 4  # columns of a word
    UNITS: tl.constexpr = BK // UNIT
    STEP: tl.constexpr = UNIT if GROUP < UNIT else GROUP
    PADDED: tl.constexpr = K if BITS == 8 else (K + STEP - 1) // STEP * STEP
    ROW: tl.constexpr = K if BITS == 8 else PADDED // 4
    GROUPS: tl.constexpr = (PADDED + GROUP - 1) // GROUP
    b = tl.arange(0, BB)
    word = tl.arange(0, WORDS)
    total = tl.zeros((BN, BB, UNITS, WORDS), tl.float32)
    squares = tl.zeros((BB, UNITS, WORDS), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        unit = k0 // UNIT + tl.arange(0, UNITS)
        place = unit[:, None] * WORDS + word[None, :]  # (UNITS, WORDS), of a row's words
        words = tl.load(
            weight + n[:, None, None].to(tl.int64) * ROW + place[None, :, :],
            mask=n_mask[:, None, None] & (place < ROW)[None, :, :], other=0,
        ).to(tl.int32)  # fmt: skip
        scale = tl.zeros((BN, UNITS), tl.float32)
        for part in tl.static_range(PARTS):
            first = unit * UNIT + part * 16
            if part == 0 or (part * 16) % GROUP == 0:
                scale = tl.load(
                    scales + n[:, None].to(tl.int64) * GROUPS + (first // GROUP)[None, :],
                    mask=n_mask[:, None] & (first < K)[None, :], other=0.0,
                )  # fmt: skip
            k = first[:, None] + word[None, :]
            values = tl.load(
                x + b[:, None, None] * x_stride + k[None, :, :],
                mask=(b < rows)[:, None, None] & (k < K)[None, :, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            if NORMED:
                squares += values * values
                values *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :, :]
            if BITS == 8:
                numbers = ((words & 255) ^ 128 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
            else:
                numbers = (((words >> (4 * part)) & 15) ^ 8 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            numbers *= scale[:, :, None]
            total += numbers[:, None, :, :] * values[None, :, :, :]
    return tl.sum(tl.sum(total, axis=3), axis=2), tl.sum(tl.sum(squares, axis=2), axis=1)


@triton.jit
def _products(
    x, x_stride, norm, weight, scales, n, n_mask, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of weight rows n and rows of x, and (BB,) sums of x^2; BITS 0: a floating weight, 1: fp8."""
    if BITS > 1:
        total, squares = _integer_products(
            x, x_stride, norm, weight, scales, n, n_mask, rows, K, BITS, GROUP, BB, BK, BN, NORMED, STAGES
        )  # fmt: skip
    else:
        total, squares = _float_products(
            x, x_stride, norm, weight, n, n_mask, rows, K, BB, BK, BN, NORMED, STAGES, BITS == 1
        )
        if BITS == 1:
            total *= tl.load(scales + n, mask=n_mask, other=0.0)[:, None]
    return total, squares


@triton.jit
def in_proj_kernel(
    residual, norm, weight, scales, bias, conv_state, conv, conv_bias, u, z, eps, rows,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < 2 * D
    row = b[None, :].to(tl.int64)
    valid = (b < rows)[None, :]
    is_x = n < D
    mask = is_x[:, None] & valid
    # The window is loaded before the product, so that nothing waits for it afterwards.
    window = conv_state + (row * D + n[:, None]) * (WIDTH - 1)
    inputs = ()
    for j in tl.static_range(WIDTH - 1):
        inputs = inputs + (tl.load(window + j, mask=mask, other=0.0).to(tl.float32),)
    xz, squares = _products(
        residual, H, norm, weight, scales, n, n_mask, rows, H, BITS, GROUP, BB, BK, BN, True, STAGES
    )  # fmt: skip
    xz *= tl.rsqrt(squares / H + eps)[None, :]
    if HAS_BIAS:
        xz += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    dtype = u.dtype.element_ty
    xz = xz.to(dtype).to(tl.float32)
    y = xz * tl.load(conv + n * WIDTH + (WIDTH - 1), mask=is_x, other=0.0).to(tl.float32)[:, None]
    if HAS_CONV_BIAS:
        y += tl.load(conv_bias + n, mask=is_x, other=0.0).to(tl.float32)[:, None]
    for j in tl.static_range(WIDTH - 1):
        y += inputs[j] * tl.load(conv + n * WIDTH + j, mask=is_x, other=0.0).to(tl.float32)[:, None]
    inputs = inputs + (xz,)
    tl.debug_barrier()  # all threads have read what is overwritten: a small tile's elements are replicated
    for j in tl.static_range(WIDTH - 1):
        tl.store(window + j, inputs[j + 1].to(conv_state.dtype.element_ty), mask=mask)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + row * D + n[:, None], y.to(dtype), mask=mask)
    tl.store(z + row * D + (n[:, None] - D), xz.to(dtype), mask=(n_mask & (n >= D))[:, None] & valid)


@triton.jit
def x_proj_kernel(
    u, weight, scales, sums, rows,
    R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums (rows, R) float32."""
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total, _ = _products(
        u, D, u, weight, scales, n, n < R, rows, D, BITS, GROUP, BB, BK, BN, False, STAGES
    )  # fmt: skip
    tl.store(sums + b[None, :] * R + n[:, None], total, mask=(n < R)[:, None] & (b < rows)[None, :])


@triton.jit
def scan_kernel(
    sums, dt_proj, dt_bias, A_log, D_skip, u, z, state, y, dt_norm, B_norm, C_norm, mixer_eps, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """NORMS of dt, B and C: 0 none, 1 without weights, 2 with weights."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    d_mask = d < D
    j = tl.arange(0, BR)
    i = tl.arange(0, BS)
    b = tl.program_id(1).to(tl.int64)
    n_mask = d_mask[:, None] & (i < N)[None, :]
    place = state + (b * D + d)[:, None] * N + i[None, :]
    h = tl.load(place, mask=n_mask, other=0.0)
    w = tl.load(dt_proj + d[:, None] * RANK + j[None, :], mask=d_mask[:, None] & (j < RANK)[None, :], other=0.0)
    A = -tl.exp(tl.load(A_log + d[:, None] * N + i[None, :], mask=n_mask, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    skip = tl.load(D_skip + d, mask=d_mask, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    p = sums + b * R
    dt = tl.load(p + j, mask=j < RANK, other=0.0).to(dtype).to(tl.float32)
    B = tl.load(p + RANK + i, mask=i < N, other=0.0).to(dtype).to(tl.float32)
    C = tl.load(p + RANK + N + i, mask=i < N, other=0.0).to(dtype).to(tl.float32)
    if NORMS:
        dt = normed(dt, dt_norm, j, RANK, mixer_eps, dtype, NORMS)
        B = normed(B, B_norm, i, N, mixer_eps, dtype, NORMS)
        C = normed(C, C_norm, i, N, mixer_eps, dtype, NORMS)
    delta = tl.sum(w.to(tl.float32) * dt[None, :], axis=1).to(dtype).to(tl.float32) + bias
    delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
    x = tl.load(u + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    gate = tl.load(z + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
    tl.debug_barrier()  # as in in_proj_kernel
    tl.store(place, h, mask=n_mask)
    out = tl.sum(h * C[None, :], axis=1) + skip * x
    out = out * gate / (1.0 + tl.exp(-gate))
    tl.store(y + b * D + d, out.to(dtype), mask=d_mask)


@triton.jit
def out_proj_kernel(
    y, weight, scales, bias, residual, rows,
    H: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < H
    place = residual + b[None, :] * H + n[:, None]
    mask = n_mask[:, None] & (b < rows)[None, :]
    stream = tl.load(place, mask=mask, other=0.0)
    total, _ = _products(
        y, D, y, weight, scales, n, n_mask, rows, D, BITS, GROUP, BB, BK, BN, False, STAGES
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    stream += total.to(y.dtype.element_ty).to(tl.float32)
    tl.debug_barrier()  # as in in_proj_kernel
    tl.store(place, stream, mask=mask)


@triton.jit
def head_kernel(
    residual, norm, weight, scales, logits, best, best_token, eps, rows,
    H: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32; best, best_token (rows, BLOCKS): each program's largest logit and its first token."""
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < V
    total, squares = _products(
        residual, H, norm, weight, scales, n, n_mask, rows, H, BITS, GROUP, BB, BK, BN, True, STAGES
    )  # fmt: skip
    total = (total * tl.rsqrt(squares / H + eps)[None, :]).to(norm.dtype.element_ty).to(tl.float32)
    row = b[None, :].to(tl.int64)
    tl.store(logits + row * V + n[:, None], total, mask=n_mask[:, None] & (b < rows)[None, :])
    candidates = tl.where(n_mask[:, None], total, float("-inf"))
    largest = tl.max(candidates, axis=0)
    token = tl.min(tl.where(candidates == largest[None, :], n[:, None], V - 1), axis=0)
    place = b * BLOCKS + tl.program_id(0)
    tl.store(best + place, largest, mask=b < rows)
    tl.store(best_token + place, token, mask=b < rows)
