"""The Triton kernels of `triton.py` for (b, d, l) memory: a program has a few channels and a run of their tokens.

Tokens are spread over the lanes of a warp one by one, so that the k loads of the window, each one element apart, are
whole lines of memory whatever the length of a row is; all but the first find theirs in the cache.
"""

# Alignment is no gain here (see above), and the kernels' tuples grow by concatenation, the form Triton compiles.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from mambakit.ops.causal_conv1d.triton_kernels import _initial, _preactivation_gradient, _state_row

_UNALIGNED = ["x", "y", "dy", "dx", "starts", "ids", "cu_seqlens", "slots"]
_SIZES = ["length", "chunks", "rows", "programs", "stride_xb", "stride_xc", "stride_yb", "stride_yc"]


@triton.jit
def _taps(weight, bias, c, inside, stride_wd, stride_wk, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    taps = ()
    for j in tl.static_range(K):
        tap = tl.load(weight + c.to(tl.int64) * stride_wd + j * stride_wk, mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32)[:, None],)
    offset = tl.zeros((c.shape[0], 1), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[:, None]
    return taps, offset


@triton.jit
def _input(
    x_row, initial, p, start, state_row, c, wanted, stride_s, stride_d, stride_k,
    K: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The inputs at positions p (tokens), those before a sequence's start from its initial state."""
    value = tl.load(x_row[:, None] + p[None, :], mask=(p >= start)[None, :] & wanted, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        value += _initial(
            initial, state_row, c[:, None], (p - start + (K - 1))[None, :], (p < start)[None, :] & wanted,
            stride_s, stride_d, stride_k,
        )  # fmt: skip
    return value


@triton.jit
def _state_rows(slots, ids, batch, t, live, HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr):
    """The rows of the initial states: (1, tokens) of a packed row, else (channels, 1)."""
    if PACKED:
        row = tl.load(ids + t, mask=live, other=0)
        if HAS_SLOTS:
            row = tl.load(slots + row, mask=live, other=-1)
        rows = row[None, :]
    else:
        row = batch.to(tl.int32)
        if HAS_SLOTS:
            row = tl.load(slots + row)
        rows = row[:, None]
    return rows


@triton.jit
def _write_final(
    x, initial, slots, cu_seqlens, final, program, length, channels, stride_xb, stride_xc, stride_s, stride_d, stride_k,
    K: tl.constexpr, KP: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The last k - 1 inputs of a sequence, of a block of channels."""
    blocks = tl.cdiv(channels, BLOCK_D)
    sequence = (program) // blocks
    c = ((program) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    state_row = _state_row(slots, sequence, HAS_SLOTS)
    begin, end = 0, length
    x_row = x + c.to(tl.int64) * stride_xc
    if PACKED:
        begin = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    else:
        x_row += sequence.to(tl.int64) * stride_xb
    index = tl.arange(0, KP)
    wanted = (c < channels)[:, None] & (index < K - 1)[None, :]
    value = _input(
        x_row, initial, end - (K - 1) + index, index * 0 + begin, state_row, c, wanted,
        stride_s, stride_d, stride_k, K, HAS_INITIAL,
    )  # fmt: skip
    place = (sequence.to(tl.int64) * channels + c) * (K - 1)
    tl.store(final + place[:, None] + index[None, :], value.to(final.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def forward_kernel(
    x, weight, bias, initial, slots, starts, ids, cu_seqlens, y, final,
    length, channels, chunks, rows, programs,
    stride_xb, stride_xc, stride_wd, stride_wk, stride_s, stride_d, stride_k,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, KP: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs:
        row = (program // chunks) * ROWS + tl.arange(0, ROWS)
        t = (program % chunks) * TOKENS + tl.arange(0, TOKENS)
        inside, live = row < rows, t < length
        batch, c = (row // channels).to(tl.int64), row % channels
        taps, offset = _taps(weight, bias, c, inside, stride_wd, stride_wk, K, HAS_BIAS)
        x_row = x + batch * stride_xb + c.to(tl.int64) * stride_xc
        wanted = inside[:, None] & live[None, :]
        start = tl.load(starts + t, mask=live, other=0) if PACKED else t * 0
        state_row = _state_rows(slots, ids, batch, t, live, HAS_SLOTS, PACKED) if HAS_INITIAL else t[None, :]
        value = tl.zeros((ROWS, TOKENS), tl.float32) + offset
        for j in tl.static_range(K):
            value += taps[j] * _input(
                x_row, initial, t - (K - 1) + j, start, state_row, c, wanted, stride_s, stride_d, stride_k,
                K, HAS_INITIAL,
            )  # fmt: skip
        if SILU:
            value = value * tl.sigmoid(value)
        y_row = y + row.to(tl.int64) * length
        tl.store(y_row[:, None] + t[None, :], value.to(y.dtype.element_ty), mask=wanted)
    else:
        # The programs after those write the final states, of BLOCK_D channels of a sequence each.
        _write_final(
            x, initial, slots, cu_seqlens, final, program - programs, length, channels, stride_xb, stride_xc,
            stride_s, stride_d, stride_k, K, KP, BLOCK_D, HAS_INITIAL, HAS_SLOTS, PACKED,
        )  # fmt: skip


@triton.jit
def _write_dinitial(
    dy, dfinal, x, weight, bias, initial, cu_seqlens, dinitial, program, length, channels,
    stride_yb, stride_yc, stride_xb, stride_xc, stride_wd, stride_wk, stride_s, stride_d, stride_k,
    K: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of a sequence's initial state, of a block of channels."""
    blocks = tl.cdiv(channels, BLOCK_D)
    sequence = ((program) // blocks).to(tl.int64)
    c = ((program) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = c < channels
    taps, offset = _taps(weight, bias, c, inside, stride_wd, stride_wk, K, HAS_BIAS)
    begin, finish = 0, length
    x_row = x + c.to(tl.int64) * stride_xc
    dy_row = dy + c.to(tl.int64) * stride_yc
    if PACKED:
        begin = tl.load(cu_seqlens + sequence)
        finish = tl.load(cu_seqlens + sequence + 1)
    else:
        x_row += sequence * stride_xb
        dy_row += sequence * stride_yb
    window = ()
    for j in tl.static_range(K - 1):
        place = initial + sequence * stride_s + c.to(tl.int64) * stride_d + j * stride_k
        window = window + (tl.load(place, mask=inside, other=0.0).to(tl.float32)[:, None],)
    gradients = ()
    for i in tl.static_range(K - 1):
        exists = inside & (begin + i < finish)
        x_t = tl.load(x_row + begin + i, mask=exists, other=0.0).to(tl.float32)[:, None]
        g = tl.load(dy_row + begin + i, mask=exists, other=0.0).to(tl.float32)[:, None]
        window = window + (x_t,)
        value = offset + taps[0] * window[0]
        for j in tl.static_range(1, K):
            value += taps[j] * window[j]
        gradients = gradients + (_preactivation_gradient(g, value, SILU),)
        window = window[1:]
    for j in tl.static_range(K - 1):
        cell = (sequence * channels + c) * (K - 1) + j
        total = tl.zeros((BLOCK_D, 1), tl.float32)
        for i in tl.static_range(j + 1):
            total += taps[j - i] * gradients[i]
        if HAS_DFINAL:
            # The final state of a sequence shorter than k - 1 has the newer part of its initial state.
            moved = tl.load(dfinal + cell - (finish - begin), mask=inside & (j >= finish - begin), other=0.0)
            total += moved.to(tl.float32)[:, None]
        tl.store(dinitial + cell[:, None], total.to(dinitial.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def backward_kernel(
    dy, dfinal, x, weight, bias, initial, starts, ids, cu_seqlens, dx, partials, dinitial,
    length, channels, chunks, rows, programs,
    stride_yb, stride_yc, stride_xb, stride_xc, stride_wd, stride_wk, stride_s, stride_d, stride_k,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A program has STEPS tiles of ROWS channels and TOKENS tokens. All tokens of a tile but the last k - 1 are its
    own: those wait for the gradients, before the activation, of tokens that the next tile computes again."""
    program = tl.program_id(0)
    OWN: tl.constexpr = TOKENS - (K - 1)
    if program < programs:
        row = (program // chunks) * ROWS + tl.arange(0, ROWS)
        chunk = program % chunks
        at = tl.arange(0, TOKENS)
        inside = row < rows
        batch, c = (row // channels).to(tl.int64), row % channels
        taps, offset = _taps(weight, bias, c, inside, stride_wd, stride_wk, K, HAS_BIAS)
        x_row = x + batch * stride_xb + c.to(tl.int64) * stride_xc
        dy_row = dy + batch * stride_yb + c.to(tl.int64) * stride_yc
        dx_row = dx + row.to(tl.int64) * length
        zero = tl.zeros((ROWS, TOKENS), tl.float32)
        sums = (zero,)
        for _ in tl.static_range(K):
            sums = sums + (zero,)
        for step in range(STEPS):
            t = (chunk * STEPS + step) * OWN + at
            live = t < length
            own = live & (at < OWN)
            wanted = inside[:, None] & live[None, :]
            start = tl.load(starts + t, mask=live, other=0) if PACKED else t * 0
            state_row = _state_rows(initial, ids, batch, t, live, False, PACKED) if HAS_INITIAL else t[None, :]
            window = ()
            value = zero + offset
            for j in tl.static_range(K):
                window = window + (
                    _input(
                        x_row, initial, t - (K - 1) + j, start, state_row, c, wanted, stride_s, stride_d, stride_k,
                        K, HAS_INITIAL,
                    ),
                )  # fmt: skip
                value += taps[j] * window[j]
            g = tl.load(dy_row[:, None] + t[None, :], mask=wanted, other=0.0).to(tl.float32)
            g = _preactivation_gradient(g, value, SILU)
            counted = tl.where(own[None, :], g, 0.0)
            grown = ()
            for j in tl.static_range(K):
                grown = grown + (sums[j] + counted * window[j],)
            sums = grown + (sums[K] + counted,)

            # The input at t has gained from the outputs at t to t + k - 1 of its sequence.
            result = taps[K - 1] * g
            for lag in tl.static_range(1, K):
                index = tl.broadcast_to(tl.minimum(at + lag, TOKENS - 1)[None, :], (ROWS, TOKENS))
                share = taps[K - 1 - lag] * tl.gather(g, index, 1)
                if PACKED:
                    later = tl.load(starts + t + lag, mask=t + lag < length, other=0)
                    share = tl.where((later <= t)[None, :], share, 0.0)
                result += share
            if HAS_DFINAL:
                sequence = (batch.to(tl.int32) + tl.zeros_like(row))[:, None] + t[None, :] * 0
                finish = t * 0 + length
                if PACKED:
                    of_token = tl.load(ids + t, mask=own, other=0)
                    sequence = of_token[None, :] + row[:, None] * 0
                    finish = tl.load(cu_seqlens + of_token + 1, mask=own, other=0)
                index = t - finish + (K - 1)
                cell = (sequence.to(tl.int64) * channels + c[:, None]) * (K - 1) + index[None, :]
                last = ((index >= 0) & own)[None, :] & inside[:, None]
                result += tl.load(dfinal + cell, mask=last, other=0.0).to(tl.float32)
            tl.store(dx_row[:, None] + t[None, :], result.to(dx.dtype.element_ty), mask=inside[:, None] & own[None, :])
        place = partials + (batch * chunks + chunk) * (K + 1) * channels + c
        for j in tl.static_range(K + 1):
            tl.store(place + j * channels, tl.sum(sums[j], axis=1), mask=inside)
    elif HAS_INITIAL:
        # The programs after those write dinitial, of BLOCK_D channels of a sequence each.
        _write_dinitial(
            dy, dfinal, x, weight, bias, initial, cu_seqlens, dinitial, program - programs, length, channels,
            stride_yb, stride_yc, stride_xb, stride_xc, stride_wd, stride_wk, stride_s, stride_d, stride_k,
            K, BLOCK_D, SILU, HAS_BIAS, HAS_DFINAL, PACKED,
        )  # fmt: skip
