"""The Triton kernels of `triton.py` for (b, d, l) memory: a lane has VECTOR neighbouring tokens of a channel, 16 bytes
at a multiple of 16 bytes, which it loads and stores at once.

What a lane needs of the tokens before and after its own it loads as whole vectors, too: they are its neighbours', and
come from the cache. Sequences begin with zeros and leave what nobody differentiates; packed ones and those with states
are `triton_tokens_kernels.py`'s.

Where the length is no multiple of VECTOR (not EVEN), a row begins and ends within a vector, which has tokens of other
rows, too. Lanes of both rows load it, each takes the others' tokens for zeros and stores its own one by one.
"""

# The kernels' tuples grow by concatenation, the form Triton compiles.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from mambakit.ops.causal_conv1d.triton_kernels import _preactivation_gradient
from mambakit.ops.causal_conv1d.triton_tokens_kernels import _taps, _write_final

_SIZES = ["length", "chunks", "rows", "programs", "stride_xb", "stride_xc", "stride_yb", "stride_yc"]


@triton.jit
def _shift(row, length, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """The tokens of other rows that a row's first vector begins with: (ROWS, 1)."""
    shift = row * 0 if EVEN else (row & (VECTOR - 1)) * (length & (VECTOR - 1)) & (VECTOR - 1)
    return shift[:, None]


@triton.jit
def _is_own(token, length):
    """Whether a row has the token: as unsigned numbers, those before the first are large."""
    return token.to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True)


@triton.jit
def _four(x):
    """The elements of (rows, lanes, 2, 2), each (rows, lanes)."""
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _vector(row, at, wanted, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The float32 elements, each (ROWS, LANES), of the vectors ``at`` of every row; zeros where not ``wanted``."""
    lanes = tl.arange(0, LANES * VECTOR)
    at = at + lanes // VECTOR
    place = at.to(tl.int64) * VECTOR + lanes % VECTOR
    x = tl.load(row[:, None] + place[None, :], mask=wanted, other=0.0).to(tl.float32)
    if VECTOR == 8:
        even, odd = tl.split(tl.reshape(x, (ROWS, LANES, 2, 2, 2)))
        a, b = _four(even), _four(odd)
        elements = (a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3])
    else:
        elements = _four(tl.reshape(x, (ROWS, LANES, 2, 2)))
    return elements


@triton.jit
def _store_vector(
    row, at, elements, shift, length, inside,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The inverse of `_vector`, of tokens that are the row's."""
    if VECTOR == 8:
        even = tl.join(tl.join(elements[0], elements[4]), tl.join(elements[2], elements[6]))
        odd = tl.join(tl.join(elements[1], elements[5]), tl.join(elements[3], elements[7]))
        x = tl.join(even, odd)
    else:
        x = tl.join(tl.join(elements[0], elements[2]), tl.join(elements[1], elements[3]))
    lanes = tl.arange(0, LANES * VECTOR)
    at = at + lanes // VECTOR
    place = row[:, None] + (at.to(tl.int64) * VECTOR + lanes % VECTOR)[None, :]
    x = tl.reshape(x, (ROWS, LANES * VECTOR)).to(row.dtype.element_ty)
    first = (at * VECTOR)[None, :] - shift
    if EVEN:
        tl.store(place, x, mask=inside[:, None] & (first < length))
    else:
        whole = (first >= 0) & (first <= length - VECTOR)
        tl.store(place, x, mask=inside[:, None] & whole)
        own = _is_own(first + (lanes % VECTOR)[None, :], length)
        tl.store(place, x, mask=inside[:, None] & (whole == 0) & own)


@triton.jit
def _vectors(
    row, at, shift, length, inside, FIRST: tl.constexpr, END: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The elements of vectors FIRST to END, from each lane's own, which is the one at ``at`` plus its number."""
    lane = tl.arange(0, LANES * VECTOR) // VECTOR
    elements = ()
    for i in tl.static_range(FIRST, END):
        live = (at + i + lane >= 0)[None, :] & (((at + i + lane) * VECTOR)[None, :] - shift < length)
        elements = elements + _vector(row, at + i, inside[:, None] & live, ROWS, LANES, VECTOR)
    return elements


@triton.jit
def _first_vector(x, batch, c, stride_b, stride_c, VECTOR: tl.constexpr):
    """Where the first vector of each row begins."""
    start = batch * stride_b + c.to(tl.int64) * stride_c
    return x + start.to(tl.uint64) // VECTOR * VECTOR  # the compiler sees a multiple


@triton.jit
def _own(
    elements, at, shift, length, FIRST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The elements, zeros where their token is not the row's. The first is the token FIRST after the lane's first."""
    if EVEN:
        kept = elements
    else:
        first = (at + tl.arange(0, LANES))[None, :] * VECTOR - shift
        kept = ()
        for i in tl.static_range(len(elements)):
            kept = kept + (tl.where(_is_own(first + FIRST + i, length), elements[i], 0.0),)
    return kept


@triton.jit
def _preactivation(x, taps, offset, at, K: tl.constexpr):
    """Of the token whose own input is ``x[at]``."""
    value = offset + taps[0] * x[at - (K - 1)]
    for j in tl.static_range(1, K):
        value += taps[j] * x[at - (K - 1) + j]
    return value


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x, weight, bias, y, final,
    length, channels, chunks, rows, programs, stride_xb, stride_xc, stride_wd, stride_wk,
    K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
    STEPS: tl.constexpr, KP: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    BEFORE: tl.constexpr = (K - 1 + VECTOR - 1) // VECTOR
    if program < programs:
        row = (program // chunks) * ROWS + tl.arange(0, ROWS)
        chunk = program % chunks
        inside = row < rows
        batch, c = (row // channels).to(tl.int64), row % channels
        taps, offset = _taps(weight, bias, c, inside, stride_wd, stride_wk, K, HAS_BIAS)
        shift = _shift(row, length, VECTOR, EVEN)
        x_row = _first_vector(x, batch, c, stride_xb, stride_xc, VECTOR)
        y_row = _first_vector(y, 0, row, 0, length, VECTOR)
        for step in range(STEPS):
            at = (chunk * STEPS + step) * LANES
            inputs = _vectors(x_row, at, shift, length, inside, -BEFORE, 1, ROWS, LANES, VECTOR)
            inputs = _own(inputs[BEFORE * VECTOR - (K - 1) :], at, shift, length, 1 - K, LANES, VECTOR, EVEN)
            outputs = ()
            for v in tl.static_range(VECTOR):
                value = _preactivation(inputs, taps, offset, K - 1 + v, K)
                if SILU:
                    value = value * tl.sigmoid(value)
                outputs = outputs + (value,)
            _store_vector(y_row, at, outputs, shift, length, inside, ROWS, LANES, VECTOR, EVEN)
    else:
        # The programs after those write the final states, of BLOCK_D channels of a sequence each.
        _write_final(
            x, None, None, None, final, program - programs, length, channels, stride_xb, stride_xc, 0, 0, 0,
            K, KP, BLOCK_D, False, False, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dy, x, weight, bias, dx, partials,
    length, channels, chunks, rows, stride_yb, stride_yc, stride_xb, stride_xc, stride_wd, stride_wk,
    K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
    STEPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A program has STEPS tiles of ROWS channels and LANES vectors. The gradients before the activation of the k - 1
    tokens after a lane's own, which the gradients of its inputs need, it computes again."""
    program = tl.program_id(0)
    NEAR: tl.constexpr = (K - 1 + VECTOR - 1) // VECTOR  # vectors that hold k - 1 tokens
    row = (program // chunks) * ROWS + tl.arange(0, ROWS)
    chunk = program % chunks
    inside = row < rows
    batch, c = (row // channels).to(tl.int64), row % channels
    taps, offset = _taps(weight, bias, c, inside, stride_wd, stride_wk, K, HAS_BIAS)
    shift = _shift(row, length, VECTOR, EVEN)
    x_row = _first_vector(x, batch, c, stride_xb, stride_xc, VECTOR)
    dy_row = _first_vector(dy, batch, c, stride_yb, stride_yc, VECTOR)
    dx_row = _first_vector(dx, 0, row, 0, length, VECTOR)
    zero = tl.zeros((ROWS, LANES), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(K):
        sums = sums + (zero,)
    for step in range(STEPS):
        at = (chunk * STEPS + step) * LANES
        loaded = _vectors(x_row, at, shift, length, inside, -NEAR, NEAR + 1, ROWS, LANES, VECTOR)
        given = _vectors(dy_row, at, shift, length, inside, 0, NEAR + 1, ROWS, LANES, VECTOR)
        own = loaded[NEAR * VECTOR - (K - 1) : (NEAR + 1) * VECTOR]
        # Later tokens that are other rows' are only inputs of gradients that are not the row's.
        inputs = _own(own, at, shift, length, 1 - K, LANES, VECTOR, EVEN) + loaded[(NEAR + 1) * VECTOR :]
        gradients = ()
        for v in tl.static_range(VECTOR + K - 1):
            value = _preactivation(inputs, taps, offset, K - 1 + v, K)
            gradients = gradients + (_preactivation_gradient(given[v], value, SILU),)
        gradients = _own(gradients, at, shift, length, 0, LANES, VECTOR, EVEN)
        results = ()
        for v in tl.static_range(VECTOR):
            grown = ()
            for j in tl.static_range(K):
                grown = grown + (sums[j] + gradients[v] * inputs[v + j],)
            sums = grown + (sums[K] + gradients[v],)
            # The input at t has gained from the outputs at t to t + k - 1.
            result = taps[K - 1] * gradients[v]
            for lag in tl.static_range(1, K):
                result += taps[K - 1 - lag] * gradients[v + lag]
            results = results + (result,)
        _store_vector(dx_row, at, results, shift, length, inside, ROWS, LANES, VECTOR, EVEN)
    place = partials + (batch * chunks + chunk) * (K + 1) * channels + c
    for j in tl.static_range(K + 1):
        tl.store(place + j * channels, tl.sum(sums[j], axis=1), mask=inside)
