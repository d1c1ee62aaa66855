"""The Triton kernels of `triton.py`, which explains how work is tiled and launches them."""

# The kernels' tuples of tensors grow by concatenation, the form Triton compiles; types there are Triton's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

# Arguments whose alignment is no gain: specialised on it, a kernel would be compiled again for an odd length.
_UNALIGNED = ["starts", "ids", "cu_seqlens", "slots"]


# Widths up to this one unroll whatever may be: k = 4 is every Mamba's. The time that Triton's compiler takes grows
# about with the third power of a kernel's loads and stores (its coalescing pass searches the whole kernel for each of
# them).
SHORT = tl.constexpr(4)


@triton.jit(do_not_specialize=["length", "sequences"], do_not_specialize_on_alignment=_UNALIGNED)
def sequences_kernel(cu_seqlens, starts, ids, length, sequences, BLOCK: tl.constexpr):
    # Upper bound by bisection: the last sequence that starts at or before t. An empty sequence shares its start with
    # the one after it and is never the last.
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < length
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + sequences
    # 31 halvings at most: the count is an int32. The loop's bound is the same for every program.
    span = sequences
    while span > 0:
        middle = (low + high) // 2
        after = tl.load(cu_seqlens + middle, mask=inside, other=0) <= t
        open_ = low < high
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
        span = span // 2
    tl.store(ids + t, low - 1, mask=inside)
    tl.store(starts + t, tl.load(cu_seqlens + low - 1, mask=inside, other=0), mask=inside)


@triton.jit
def _state_row(slots, row, HAS_SLOTS: tl.constexpr):
    return tl.load(slots + row) if HAS_SLOTS else row


@triton.jit
def _initial(initial, row, d, index, mask, stride_s, stride_d, stride_k):
    # A negative row is a slot that holds nothing: the sequence starts from zeros.
    offset = row.to(tl.int64) * stride_s + d.to(tl.int64) * stride_d + index.to(tl.int64) * stride_k
    return tl.load(initial + offset, mask=mask & (row >= 0), other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, bias, d, inside, stride_wd, stride_wk, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    taps = ()
    for j in tl.static_range(K):
        tap = tl.load(weight + d.to(tl.int64) * stride_wd + j * stride_wk, mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        offset = tl.zeros((1, d.shape[0]), tl.float32)
    return taps, offset


@triton.jit
def _window(
    x_row, initial, slots, starts, ids, t, batch, length, d, walking, stride_t, stride_s, stride_d, stride_k,
    K: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The k - 1 inputs before position t (oldest first), those before the sequence's start from its initial state."""
    start = tl.zeros_like(t)
    row = batch.to(tl.int32)
    if PACKED:
        start = tl.load(starts + t, mask=t < length, other=0)
        row = tl.load(ids + t, mask=t < length, other=0)
    if HAS_SLOTS:
        row = tl.load(slots + row, mask=t < length, other=-1)
    window = ()
    for j in tl.static_range(K - 1):
        p = t - (K - 1) + j
        value = tl.load(
            x_row + (p.to(tl.int64) * stride_t)[:, None] + d[None, :], mask=(p >= start)[:, None] & walking, other=0.0
        ).to(tl.float32)
        if HAS_INITIAL:
            value += _initial(
                initial, row[:, None], d[None, :], (p - start + (K - 1))[:, None], (p < start)[:, None] & walking,
                stride_s, stride_d, stride_k,
            )  # fmt: skip
        window = window + (value,)
    return window


@triton.jit
def _restart(
    window, at_start, initial, slots, ids, t, length, d, channel, stride_s, stride_d, stride_k,
    K: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """The window of a packed row at position t: where a sequence starts, the inputs before it are not its own."""
    if HAS_INITIAL:
        row = tl.load(ids + t, mask=t < length, other=0)
        if HAS_SLOTS:
            row = tl.load(slots + row)
    fresh = ()
    for j in tl.static_range(K - 1):
        value = tl.where(at_start[:, None], 0.0, window[j])
        if HAS_INITIAL:
            index = tl.zeros_like(t) + j
            value += _initial(
                initial, row[:, None], d[None, :], index[:, None], at_start[:, None] & channel,
                stride_s, stride_d, stride_k,
            )  # fmt: skip
        fresh = fresh + (value,)
    return fresh


@triton.jit
def _write_final(
    x, initial, slots, cu_seqlens, final, sequence, length, channels, d, inside,
    stride_xb, stride_xt, stride_s, stride_d, stride_k,
    K: tl.constexpr, KP: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The final state of one sequence: its last k - 1 inputs."""
    row = _state_row(slots, sequence, HAS_SLOTS)
    start = 0
    end = length
    x_row = x
    if PACKED:
        start = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    else:
        x_row += sequence.to(tl.int64) * stride_xb
    index = tl.arange(0, KP)
    wanted = (index < K - 1)[None, :] & inside[:, None]
    p = end - (K - 1) + index
    value = tl.load(
        x_row + (p.to(tl.int64) * stride_xt)[None, :] + d[:, None], mask=(p >= start)[None, :] & wanted, other=0.0
    ).to(tl.float32)
    if HAS_INITIAL:
        value += _initial(
            initial, row, d[:, None], (p - start + (K - 1))[None, :], (p < start)[None, :] & wanted,
            stride_s, stride_d, stride_k,
        )  # fmt: skip
    place = (sequence.to(tl.int64) * channels + d) * (K - 1)
    tl.store(final + place[:, None] + index[None, :], value.to(final.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["length", "chunks", "walks", "programs"], do_not_specialize_on_alignment=_UNALIGNED)
def forward_kernel(
    x, weight, bias, initial, slots, starts, ids, cu_seqlens, y, final,
    length, channels, chunks, walks, programs,
    stride_xb, stride_xt, stride_wd, stride_wk, stride_s, stride_d, stride_k,
    K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    KP: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    blocks_d = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0) // blocks_d
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    channel = inside[None, :]
    if program < programs:
        taps, offset = _weights(weight, bias, d, inside, stride_wd, stride_wk, K, HAS_BIAS)
        walk = program * ROWS + tl.arange(0, ROWS)
        batch = (walk // chunks).to(tl.int64)
        first = (walk % chunks) * STEPS
        end = tl.where(walk < walks, length, 0)
        x_row = x + (batch * stride_xb)[:, None]
        y_row = y + (batch * length * channels)[:, None]
        window = _window(
            x_row, initial, slots, starts, ids, first, batch, end, d, (first < end)[:, None] & channel,
            stride_xt, stride_s, stride_d, stride_k, K, HAS_INITIAL, HAS_SLOTS, PACKED,
        )  # fmt: skip
        for i in range(0, STEPS, UNROLL):
            # All loads of a group come before its first store: the compiler cannot move a load over a store.
            ahead = ()
            starts_ahead = ()
            for u in tl.static_range(UNROLL):
                t = first + i + u
                if PACKED:
                    starts_ahead = starts_ahead + (tl.load(starts + t, mask=t < end, other=-1),)
                ahead = ahead + (
                    tl.load(
                        x_row + (t.to(tl.int64) * stride_xt)[:, None] + d[None, :],
                        mask=(t < end)[:, None] & channel,
                        other=0.0,
                    ),
                )
            for u in tl.static_range(UNROLL):
                t = first + i + u
                if PACKED:
                    window = _restart(
                        window, starts_ahead[u] == t, initial, slots, ids, t, end, d, channel, stride_s, stride_d,
                        stride_k,
                        K, HAS_INITIAL, HAS_SLOTS,
                    )  # fmt: skip
                window = window + (ahead[u].to(tl.float32),)
                value = offset + taps[0] * window[0]
                for j in tl.static_range(1, K):
                    value += taps[j] * window[j]
                if SILU:
                    value = value * tl.sigmoid(value)
                tl.store(
                    y_row + (t.to(tl.int64) * channels)[:, None] + d[None, :],
                    value.to(y.dtype.element_ty),
                    mask=(t < end)[:, None] & channel,
                )
                window = window[1:]
    else:
        # The programs after those of the walks write the final states, one sequence each.
        _write_final(
            x, initial, slots, cu_seqlens, final, program - programs, length, channels, d, inside,
            stride_xb, stride_xt, stride_s, stride_d, stride_k, K, KP, HAS_INITIAL, HAS_SLOTS, PACKED,
        )  # fmt: skip


@triton.jit
def _preactivation_gradient(dy, value, SILU: tl.constexpr):
    if SILU:
        gate = tl.sigmoid(value)
        dy = dy * gate * (1.0 + value * (1.0 - gate))
    return dy


@triton.jit
def _backward_step(
    x_t, dy_t, t, start, end, window, pending, dtaps, doffset, taps, offset, own,
    dfinal, dx, initial, slots, ids, cu_seqlens, dx_row, batch, d, channel, length, channels, stride_dt,
    stride_s, stride_d, stride_k,
    K: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
    STORE: tl.constexpr, stored,
):  # fmt: skip
    """One position of a backward walk. `own` is false past the walk's end, where the next walk counts dweight.

    STORE: t - (k - 1) is the walk's; or, of a long filter, wherever `stored` says so.
    """
    if PACKED:
        window = _restart(
            window, start == t, initial, slots, ids, t, end, d, channel, stride_s, stride_d, stride_k,
            K, HAS_INITIAL, False,
        )  # fmt: skip
    window = window + (x_t.to(tl.float32),)
    value = offset + taps[0] * window[0]
    for j in tl.static_range(1, K):
        value += taps[j] * window[j]
    g = _preactivation_gradient(dy_t.to(tl.float32), value, SILU)

    counted = tl.where(own, g, 0.0)
    sums = ()
    for j in tl.static_range(K):
        sums = sums + (dtaps[j] + counted * window[j],)
    doffset += counted

    # dx at t - lag gains weight[k - 1 - lag] * g, unless t - lag lies before the start of t's sequence.
    grown = ()
    for j in tl.static_range(K):
        share = taps[j] * g
        if PACKED and j < K - 1:
            share = tl.where((t - start >= K - 1 - j)[:, None], share, 0.0)
        grown = grown + ((pending[j] + share if j < K - 1 else share),)
    if STORE:
        # Position t - (k - 1) is complete: no later position reads it.
        p = t - (K - 1)
        complete = p < end
        if K > SHORT:
            complete &= stored
        result = grown[0]
        if HAS_DFINAL:
            row = batch
            finish = tl.zeros_like(p) + length
            if PACKED:
                row = tl.load(ids + p, mask=complete, other=0).to(tl.int64)
                finish = tl.load(cu_seqlens + row + 1)
            index = p - finish + (K - 1)
            place = ((row * channels)[:, None] + d[None, :]) * (K - 1) + index[:, None]
            last = ((index >= 0) & complete)[:, None] & channel
            result += tl.load(dfinal + place, mask=last, other=0.0).to(tl.float32)
        tl.store(
            dx_row + (p.to(tl.int64) * stride_dt)[:, None] + d[None, :],
            result.to(dx.dtype.element_ty),
            mask=complete[:, None] & channel,
        )
    return window[1:], grown[1:], sums, doffset


@triton.jit
def _write_dinitial(
    dy, dfinal, x, initial, cu_seqlens, dinitial, sequence, length, channels, d, channel, taps, offset,
    stride_yb, stride_yt, stride_xb, stride_xt, stride_s, stride_d, stride_k,
    K: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence's initial state, from the gradients of its first k - 1 pre-activations."""
    start = 0
    finish = length
    x_row = x
    dy_row = dy
    if PACKED:
        start = tl.load(cu_seqlens + sequence)
        finish = tl.load(cu_seqlens + sequence + 1)
    else:
        x_row += sequence.to(tl.int64) * stride_xb
        dy_row += sequence.to(tl.int64) * stride_yb
    window = ()
    for j in tl.static_range(K - 1):
        place = sequence.to(tl.int64) * stride_s + d[None, :].to(tl.int64) * stride_d + j * stride_k
        window = window + (tl.load(initial + place, mask=channel, other=0.0).to(tl.float32),)
    gradients = ()
    for i in tl.static_range(K - 1):
        t = (start + i).to(tl.int64)
        live = channel & (start + i < finish)
        x_t = tl.load(x_row + t * stride_xt + d[None, :], mask=live, other=0.0)
        dy_t = tl.load(dy_row + t * stride_yt + d[None, :], mask=live, other=0.0)
        window = window + (x_t.to(tl.float32),)
        value = offset + taps[0] * window[0]
        for j in tl.static_range(1, K):
            value += taps[j] * window[j]
        gradients = gradients + (_preactivation_gradient(dy_t.to(tl.float32), value, SILU),)
        window = window[1:]
    for j in tl.static_range(K - 1):
        place = (sequence.to(tl.int64) * channels + d[None, :]) * (K - 1) + j
        total = tl.zeros((1, BLOCK_D), tl.float32)
        for i in tl.static_range(j + 1):
            total += taps[j - i] * gradients[i]
        if HAS_DFINAL:
            # The final state of a sequence shorter than k - 1 has the newer part of its initial state.
            moved = place - (finish - start)
            total += tl.load(dfinal + moved, mask=channel & (j >= finish - start), other=0.0).to(tl.float32)
        tl.store(dinitial + place, total.to(dinitial.dtype.element_ty), mask=channel)


@triton.jit(do_not_specialize=["length", "chunks", "walks", "programs"], do_not_specialize_on_alignment=_UNALIGNED)
def backward_kernel(
    dy, dfinal, x, weight, bias, initial, starts, ids, cu_seqlens, dx, partials, dinitial,
    length, channels, chunks, walks, programs,
    stride_yb, stride_yt, stride_xb, stride_xt, stride_db, stride_dt, stride_wd, stride_wk, stride_s, stride_d,
    stride_k,
    K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    blocks_d = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0) // blocks_d
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    channel = inside[None, :]
    taps, offset = _weights(weight, bias, d, inside, stride_wd, stride_wk, K, HAS_BIAS)
    if program < programs:
        walk = program * ROWS + tl.arange(0, ROWS)
        batch = (walk // chunks).to(tl.int64)
        first = (walk % chunks) * STEPS
        end = tl.where(walk < walks, length, 0)
        x_row = x + (batch * stride_xb)[:, None]
        dy_row = dy + (batch * stride_yb)[:, None]
        dx_row = dx + (batch * stride_db)[:, None]
        window = _window(
            x_row, initial, initial, starts, ids, first, batch, end, d, (first < end)[:, None] & channel,
            stride_xt, stride_s, stride_d, stride_k, K, HAS_INITIAL, False, PACKED,
        )  # fmt: skip
        zero = tl.zeros((ROWS, BLOCK_D), tl.float32)
        doffset = zero
        pending = ()
        dtaps = (zero,)
        for _ in tl.static_range(K - 1):
            pending = pending + (zero,)
            dtaps = dtaps + (zero,)

        # The first k - 1 steps complete positions of the walk before: nothing to store. Short filters unroll them.
        PEELED: tl.constexpr = K - 1 if K <= SHORT else 0
        for i in tl.static_range(PEELED):
            t = first + i
            live = (t < end)[:, None] & channel
            x_t = tl.load(x_row + (t.to(tl.int64) * stride_xt)[:, None] + d[None, :], mask=live, other=0.0)
            dy_t = tl.load(dy_row + (t.to(tl.int64) * stride_yt)[:, None] + d[None, :], mask=live, other=0.0)
            start = tl.load(starts + t, mask=t < end, other=-1) if PACKED else first
            window, pending, dtaps, doffset = _backward_step(
                x_t, dy_t, t, start, end, window, pending, dtaps, doffset, taps, offset, i < STEPS,
                dfinal, dx, initial, initial, ids, cu_seqlens, dx_row, batch, d, channel, length, channels, stride_dt,
                stride_s, stride_d, stride_k, K, SILU, HAS_INITIAL, HAS_DFINAL, PACKED, False, False,
            )  # fmt: skip
        for i in range(PEELED, K - 1 + STEPS, UNROLL):
            x_ahead = ()
            dy_ahead = ()
            starts_ahead = ()
            for u in tl.static_range(UNROLL):
                t = first + i + u
                live = (t < end)[:, None] & channel
                starts_ahead = starts_ahead + (tl.load(starts + t, mask=t < end, other=-1) if PACKED else first,)
                x_ahead = x_ahead + (
                    tl.load(x_row + (t.to(tl.int64) * stride_xt)[:, None] + d[None, :], mask=live, other=0.0),
                )
                dy_ahead = dy_ahead + (
                    tl.load(dy_row + (t.to(tl.int64) * stride_yt)[:, None] + d[None, :], mask=live, other=0.0),
                )
            for u in tl.static_range(UNROLL):
                window, pending, dtaps, doffset = _backward_step(
                    x_ahead[u], dy_ahead[u], first + i + u, starts_ahead[u], end, window, pending, dtaps, doffset, taps,
                    offset,
                    i + u < STEPS,
                    dfinal, dx, initial, initial, ids, cu_seqlens, dx_row, batch, d, channel, length, channels,
                    stride_dt,
                    stride_s, stride_d, stride_k, K, SILU, HAS_INITIAL, HAS_DFINAL, PACKED, True,
                    (i + u >= K - 1) & (i + u < K - 1 + STEPS),
                )  # fmt: skip
        place = partials + program.to(tl.int64) * (K + 1) * channels + d
        for j in tl.static_range(K):
            tl.store(place + j * channels, tl.sum(dtaps[j], axis=0), mask=inside)
        tl.store(place + K * channels, tl.sum(doffset, axis=0), mask=inside)
    elif HAS_INITIAL:
        # The programs after those of the walks write dinitial, one sequence each.
        _write_dinitial(
            dy, dfinal, x, initial, cu_seqlens, dinitial, program - programs, length, channels, d, channel,
            taps, offset,
            stride_yb, stride_yt, stride_xb, stride_xt, stride_s, stride_d, stride_k,
            K, BLOCK_D, SILU, HAS_DFINAL, PACKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(
    partials, dweight, dbias, count, channels,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    begin = 0
    # Not range(): Triton 3.6's interpreter cannot turn a kernel argument into its bound (NumPy 2.4).
    while begin < count:
        row = begin + tl.arange(0, ROWS)
        place = (row.to(tl.int64) * (K + 1) + j) * channels
        total += tl.load(
            partials + place[:, None] + d[None, :], mask=(row < count)[:, None] & (d < channels)[None, :], other=0.0
        )
        begin += ROWS
    result = tl.sum(total, axis=0)
    if j < K:
        tl.store(dweight + d.to(tl.int64) * K + j, result.to(dweight.dtype.element_ty), mask=d < channels)
    elif HAS_BIAS:
        tl.store(dbias + d, result.to(dbias.dtype.element_ty), mask=d < channels)


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=_UNALIGNED)
def decode_kernel(
    state, slots, x, weight, bias, cu_seqlens, y,
    length, channels,
    stride_xb, stride_xt, stride_wd, stride_wk, stride_s, stride_d, stride_k,
    K: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program walks a whole (short) sequence, so it alone reads and writes that sequence's state."""
    blocks_d = tl.cdiv(channels, BLOCK_D)
    sequence = tl.program_id(0) // blocks_d
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    channel = inside[None, :]
    row = _state_row(slots, sequence, HAS_SLOTS)
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        x_row = x + start * stride_xt
        y_row = y + start * channels
        steps = (end - start).to(tl.int32)
    else:
        x_row = x + sequence.to(tl.int64) * stride_xb
        y_row = y + sequence.to(tl.int64) * length * channels
        steps = length
    taps, offset = _weights(weight, bias, d, inside, stride_wd, stride_wk, K, HAS_BIAS)
    cell = state + row.to(tl.int64) * stride_s + d[None, :].to(tl.int64) * stride_d
    window = ()
    for j in tl.static_range(K - 1):
        before = tl.load(cell + j * stride_k, mask=channel & (row >= 0), other=0.0)
        window = window + (before.to(tl.float32),)
    i = steps * 0
    while i < steps:
        ahead = ()
        for u in tl.static_range(UNROLL):
            t = (i + u).to(tl.int64)
            ahead = ahead + (tl.load(x_row + t * stride_xt + d[None, :], mask=channel & (i + u < steps), other=0.0),)
        for u in tl.static_range(UNROLL):
            t = (i + u).to(tl.int64)
            live = i + u < steps
            grown = window + (ahead[u].to(tl.float32),)
            value = offset + taps[0] * grown[0]
            for j in tl.static_range(1, K):
                value += taps[j] * grown[j]
            if SILU:
                value = value * tl.sigmoid(value)
            tl.store(y_row + t * channels + d[None, :], value.to(y.dtype.element_ty), mask=channel & live)
            window = ()
            for j in tl.static_range(K - 1):
                window = window + (tl.where(live, grown[j + 1], grown[j]),)
        i += UNROLL
    for j in tl.static_range(K - 1):
        tl.store(cell + j * stride_k, window[j].to(state.dtype.element_ty), mask=channel & (row >= 0))


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def scatter_kernel(
    final, state, slots, channels, stride_s, stride_d, stride_k,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = _state_row(slots, sequence, HAS_SLOTS)
    inside = (cell < channels * (K - 1)) & (row >= 0)
    value = tl.load(final + sequence.to(tl.int64) * channels * (K - 1) + cell, mask=inside)
    place = row.to(tl.int64) * stride_s + (cell // (K - 1)).to(tl.int64) * stride_d + (cell % (K - 1)) * stride_k
    tl.store(state + place, value, mask=inside)
