"""The Triton kernels of `triton_many_rows.py`, which says how they follow each other and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from mambakit.ops.decode.triton_norms import normed_rows


@triton.jit
def _total(
    x, weight, b, n, begin,
    K: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BB, BN) products of rows b of x and rows n of the weight over columns [begin, begin + COLUMNS)."""
    total = tl.zeros((BB, BN), tl.float32)
    for k0 in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        k = begin + k0 + tl.arange(0, BK)
        if K % COLUMNS == 0 and COLUMNS % BK == 0:
            values = tl.load(x + b[:, None] * K + k[None, :])
            w = tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :])
        else:
            inside = ((k < K) & (k < begin + COLUMNS))[None, :]
            values = tl.load(x + b[:, None] * K + k[None, :], mask=inside, other=0.0)
            w = tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
        total = tl.dot(values, w.T, total, input_precision="ieee")
    return total


@triton.jit
def product_kernel(
    x, weight, parts, rows,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """parts (splits, rows, N) float32: the partial sums of x weight^T of each split of the columns.

    Programs of neighbouring blocks of rows run together: they read the same tile of the weight.
    """
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    total = _total(x, weight, b, tl.minimum(n, N - 1), split * COLUMNS, K, COLUMNS, BB, BK, BN, STAGES)
    mask = (b < rows)[:, None] & (n < N)[None, :]
    tl.store(parts + (split * rows + b[:, None]) * N + n[None, :], total, mask=mask)


@triton.jit
def conv_kernel(
    parts, bias, conv_state, conv, conv_bias, u, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """u (rows, D) from in_proj's partial sums; the window is shifted by one."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (b < rows)[:, None] & (d < D)[None, :]
    at = b[:, None].to(tl.int64) * D + d[None, :]
    # The window and the new value side by side; all but the oldest are the next window.
    j = tl.arange(0, TAPS)
    place = conv_state + at[:, :, None] * (WIDTH - 1) + j[None, None, :]
    past = tl.load(place, mask=mask[:, :, None] & (j < WIDTH - 1)[None, None, :], other=0.0).to(tl.float32)
    taps = tl.load(conv + d[:, None] * WIDTH + j[None, :], mask=(d < D)[:, None] & (j < WIDTH)[None, :], other=0.0)
    x = tl.zeros((ROWS, BD), tl.float32)
    for split in tl.static_range(SPLITS):
        x += tl.load(parts + (split * rows + b[:, None]) * (2 * D) + d[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dtype = u.dtype.element_ty
    x = x.to(dtype).to(tl.float32)
    window = tl.where((j == WIDTH - 1)[None, None, :], x[:, :, None], past)
    y = tl.sum(window * taps.to(tl.float32)[None, :, :], axis=2)
    if HAS_CONV_BIAS:
        y += tl.load(conv_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.debug_barrier()  # as in norm_kernel
    moved = mask[:, :, None] & ((j > 0) & (j < WIDTH))[None, None, :]
    tl.store(place - 1, window.to(conv_state.dtype.element_ty), mask=moved)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + at, y.to(dtype), mask=mask)


@triton.jit
def scan_kernel(
    parts, xz, bias, dt_proj, dt_bias, A_log, D_skip, u, state, y, dt_norm, B_norm, C_norm, mixer_eps, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    XZ_SPLITS: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """NORMS of dt, B and C: 0 none, 1 without weights, 2 with weights."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d_mask, b_mask = d < D, b < rows
    j = tl.arange(0, BR)
    i = tl.arange(0, BS)
    # Channels before rows, so that loads are coalesced.
    both = d_mask[:, None] & b_mask[None, :]
    n_mask = i < N
    mask = both[:, :, None] & n_mask[None, None, :]
    at = b[None, :].to(tl.int64) * D + d[:, None]
    place = state + at[:, :, None] * N + i[None, None, :]
    h = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(dt_proj + d[:, None] * RANK + j[None, :], mask=d_mask[:, None] & (j < RANK)[None, :], other=0.0)
    A = tl.load(A_log + d[:, None] * N + i[None, :], mask=d_mask[:, None] & n_mask[None, :], other=0.0)
    A = -tl.exp(A.to(tl.float32))
    delta_bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    skip = tl.load(D_skip + d, mask=d_mask, other=0.0).to(tl.float32)
    x = tl.load(u + at, mask=both, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    gate = tl.zeros((BD, ROWS), tl.float32)
    for split in tl.static_range(XZ_SPLITS):
        gate += tl.load(xz + (split * rows + b[None, :]) * (2 * D) + D + d[:, None], mask=both, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + D + d, mask=d_mask, other=0.0).to(tl.float32)[:, None]
    gate = gate.to(dtype).to(tl.float32)
    dt = tl.zeros((ROWS, BR), tl.float32)
    B = tl.zeros((ROWS, BS), tl.float32)
    C = tl.zeros((ROWS, BS), tl.float32)
    for split in tl.range(SPLITS):  # not unrolled: ptxas would spill
        p = parts + (split * rows + b[:, None]) * R
        dt += tl.load(p + j[None, :], mask=b_mask[:, None] & (j < RANK)[None, :], other=0.0)
        B += tl.load(p + RANK + i[None, :], mask=b_mask[:, None] & n_mask[None, :], other=0.0)
        C += tl.load(p + RANK + N + i[None, :], mask=b_mask[:, None] & n_mask[None, :], other=0.0)
    if NORMS:
        dt = normed_rows(dt, dt_norm, j, RANK, mixer_eps, dtype, NORMS)
        B = normed_rows(B, B_norm, i, N, mixer_eps, dtype, NORMS)
        C = normed_rows(C, C_norm, i, N, mixer_eps, dtype, NORMS)
    B, C = B.to(dtype).to(tl.float32), C.to(dtype).to(tl.float32)
    delta = tl.dot(w.to(dtype), dt.to(dtype).T, input_precision="ieee").to(dtype).to(tl.float32) + delta_bias[:, None]
    delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
    h = tl.exp(delta[:, :, None] * A[:, None, :]) * h + (delta * x)[:, :, None] * B[None, :, :]
    tl.store(place, h.to(state.dtype.element_ty), mask=mask)
    out = tl.sum(h * C[None, :, :], axis=2) + skip[:, None] * x
    out = out * gate / (1.0 + tl.exp(-gate))
    tl.store(y + at, out.to(dtype), mask=both)


@triton.jit
def norm_kernel(
    parts, bias, residual, norm, x, eps, rows,
    H: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x (rows, H): the normalised residual stream, after adding out_proj's partial sums."""
    b = tl.program_id(0)
    i = tl.arange(0, SIZE)
    mask = i < H
    stream = tl.load(residual + b * H + i, mask=mask, other=0.0)
    dtype = x.dtype.element_ty
    if SPLITS:
        total = tl.zeros((SIZE,), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + (split * rows + b) * H + i, mask=mask, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + i, mask=mask, other=0.0).to(tl.float32)
        stream += total.to(dtype).to(tl.float32)
        tl.debug_barrier()  # all threads have read what is overwritten: a small tile's elements are replicated
        tl.store(residual + b * H + i, stream, mask=mask)
    scale = tl.load(norm + i, mask=mask, other=0.0).to(tl.float32)
    normed = stream * tl.rsqrt(tl.sum(stream * stream, axis=0) / H + eps) * scale
    tl.store(x + b * H + i, normed.to(dtype), mask=mask)


@triton.jit
def head_kernel(
    x, weight, logits, best, best_token, rows,
    H: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32; best, best_token (rows, BLOCKS): each program's largest logit and its first token."""
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_mask = (n < V)[None, :]
    total = _total(x, weight, b, tl.minimum(n, V - 1), 0, H, H, BB, BK, BN, STAGES)
    total = total.to(x.dtype.element_ty).to(tl.float32)
    tl.store(logits + b[:, None].to(tl.int64) * V + n[None, :], total, mask=n_mask & (b < rows)[:, None])
    candidates = tl.where(n_mask, total, float("-inf"))
    largest = tl.max(candidates, axis=1)
    token = tl.min(tl.where(candidates == largest[:, None], n[None, :], V - 1), axis=1)
    place = b * BLOCKS + tl.program_id(1)
    tl.store(best + place, largest, mask=b < rows)
    tl.store(best_token + place, token, mask=b < rows)
