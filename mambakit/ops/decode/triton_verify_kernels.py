"""The Triton kernels of `triton_verify.py`, which says how they follow each other and launches them.

Row s * TOKENS + t is token t of slot s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambakit.ops.decode.triton_norms import normed, normed_rows


@triton.jit
def _input(parts, bias, row, rows, d, mask, D: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(BD,) channels ``d`` of a row of (rows, 2 D), from in_proj's partial sums."""
    x = tl.zeros(d.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        x += tl.load(parts + (split * rows + row) * (2 * D) + d, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def verify_conv_kernel(
    parts, bias, conv_state, conv, conv_bias, u, inputs, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """u (rows, D); the window is read and not written. inputs (rows, D) keeps what the convolution was given."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1)
    slot, t = row // TOKENS, row % TOKENS
    mask = d < D
    dtype = u.dtype.element_ty
    y = tl.zeros((BD,), tl.float32)
    for j in tl.static_range(WIDTH):
        at = t + j - (WIDTH - 1)  # the input that tap j multiplies: a token of the draft, or of the window before it
        # Both are loaded, one of them without a lane: which one it is depends on the row.
        x = _input(parts, bias, row + at - t, rows, d, mask & (at >= 0), D, SPLITS, HAS_BIAS).to(dtype).to(tl.float32)
        before = conv_state + (slot.to(tl.int64) * D + d) * (WIDTH - 1) + t + j
        past = tl.load(before, mask=mask & (at < 0), other=0.0).to(tl.float32)
        value = tl.where(at >= 0, x, past)
        y += value * tl.load(conv + d * WIDTH + j, mask=mask, other=0.0).to(tl.float32)
        if j == WIDTH - 1:
            tl.store(inputs + row.to(tl.int64) * D + d, value.to(inputs.dtype.element_ty), mask=mask)
    if HAS_CONV_BIAS:
        y += tl.load(conv_bias + d, mask=mask, other=0.0).to(tl.float32)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + row.to(tl.int64) * D + d, y.to(dtype), mask=mask)


@triton.jit
def verify_scan_kernel(
    parts, xz, bias, dt_proj, dt_bias, A_log, D_skip, u, state, y, decay, steps, us, Bs, dt_norm, B_norm,
    C_norm, mixer_eps, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    XZ_SPLITS: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """y (rows, D) after each token of a slot; its state is read and not written.

    What `replay_kernel` needs is kept: decay (D, N) = -exp(A_log), and of each row the step sizes, u and B.
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    slot = tl.program_id(1)
    d_mask = d < D
    j = tl.arange(0, BR)
    i = tl.arange(0, BS)
    n_mask = i < N
    both = d_mask[:, None] & n_mask[None, :]
    dtype = y.dtype.element_ty
    A = tl.load(A_log + d[:, None] * N + i[None, :], mask=both, other=0.0)
    A = -tl.exp(A.to(tl.float32))
    if slot == 0:
        tl.store(decay + d[:, None] * N + i[None, :], A, mask=both)
    h = tl.load(state + (slot.to(tl.int64) * D + d)[:, None] * N + i[None, :], mask=both, other=0.0).to(tl.float32)
    delta_bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    skip = tl.load(D_skip + d, mask=d_mask, other=0.0).to(tl.float32)
    # The step sizes of all tokens: one product on the tensor cores.
    tokens = tl.arange(0, BT)
    t_mask = tokens < TOKENS
    w = tl.load(dt_proj + d[:, None] * RANK + j[None, :], mask=d_mask[:, None] & (j < RANK)[None, :], other=0.0)
    dt = tl.zeros((BT, BR), tl.float32)
    for split in tl.range(SPLITS):
        p = parts + (split * rows + slot * TOKENS + tokens)[:, None] * R + j[None, :]
        dt += tl.load(p, mask=t_mask[:, None] & (j < RANK)[None, :], other=0.0)
    if NORMS:
        dt = normed_rows(dt, dt_norm, j, RANK, mixer_eps, dtype, NORMS)
    product = tl.dot(w.to(dtype), dt.to(dtype).T, input_precision="ieee").to(dtype).to(tl.float32)  # (BD, BT)
    for t in tl.range(TOKENS):
        row = slot * TOKENS + t
        B = tl.zeros((BS,), tl.float32)
        C = tl.zeros((BS,), tl.float32)
        for split in tl.range(SPLITS):
            p = parts + (split * rows + row) * R + RANK + i
            B += tl.load(p, mask=n_mask, other=0.0)
            C += tl.load(p + N, mask=n_mask, other=0.0)
        if NORMS:
            B = normed(B, B_norm, i, N, mixer_eps, dtype, NORMS)
            C = normed(C, C_norm, i, N, mixer_eps, dtype, NORMS)
        B, C = B.to(dtype).to(tl.float32), C.to(dtype).to(tl.float32)
        delta = tl.sum(tl.where((tokens == t)[None, :], product, 0.0), axis=1) + delta_bias
        delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
        at = row.to(tl.int64) * D + d
        x = tl.load(u + at, mask=d_mask, other=0.0).to(tl.float32)
        h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
        gate = _input(xz + D, bias + D if HAS_BIAS else bias, row, rows, d, d_mask, D, XZ_SPLITS, HAS_BIAS)
        gate = gate.to(dtype).to(tl.float32)
        out = tl.sum(h * C[None, :], axis=1) + skip * x
        out = out * gate / (1.0 + tl.exp(-gate))
        tl.store(y + at, out.to(dtype), mask=d_mask)
        tl.store(steps + at, delta, mask=d_mask)
        tl.store(us + at, x.to(dtype), mask=d_mask)
        if tl.program_id(0) == 0:
            tl.store(Bs + row * N + i, B, mask=n_mask)


@triton.jit
def replay_kernel(
    kept, conv_state, state, inputs, decay, steps, us, Bs, rows, slots,
    D: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """The states of all layers after the first ``kept`` (slots,) int64 tokens of each slot, in place.

    conv_state (layers, slots, D, WIDTH - 1), state (layers, slots, D, N); inputs, steps, us (layers, rows, D), decay
    (layers, D, N), Bs (layers, rows, N).
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    slot = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    d_mask = d < D
    m = tl.load(kept + slot).to(tl.int32)
    i = tl.arange(0, BS)
    both = d_mask[:, None] & (i < N)[None, :]
    place = state + ((layer * slots + slot) * D + d)[:, None] * N + i[None, :]
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    A = tl.load(decay + (layer * D + d)[:, None] * N + i[None, :], mask=both, other=0.0)
    for t in tl.range(TOKENS):
        row = layer * rows + slot * TOKENS + t
        # A step of 0 leaves the state as it is. What follows the kept tokens may not be a number.
        delta = tl.load(steps + row * D + d, mask=d_mask & (t < m), other=0.0)
        x = tl.load(us + row * D + d, mask=d_mask & (t < m), other=0.0).to(tl.float32)
        B = tl.load(Bs + row * N + i, mask=(i < N) & (t < m), other=0.0)
        h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
    # The window's entry j is input m + j - (WIDTH - 1) of the draft, or entry m + j of the window before it.
    j = tl.arange(0, TAPS)
    at = m + j - (WIDTH - 1)
    window = conv_state + ((layer * slots + slot) * D + d)[:, None] * (WIDTH - 1) + j[None, :]
    inside = d_mask[:, None] & (j < WIDTH - 1)[None, :]
    past = tl.load(window + m, mask=inside & (at < 0)[None, :], other=0.0)
    row = layer * rows + slot * TOKENS + at
    new = tl.load(inputs + row[None, :] * D + d[:, None], mask=inside & (at >= 0)[None, :], other=0.0)
    values = tl.where((at >= 0)[None, :], new.to(past.dtype), past)
    tl.debug_barrier()  # all threads have read what is overwritten
    if m > 0:
        tl.store(place, h.to(state.dtype.element_ty), mask=both)
        tl.store(window, values, mask=inside)
