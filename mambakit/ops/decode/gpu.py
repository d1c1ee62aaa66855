"""One token through a whole Mamba model on a GPU: five kernels a layer at most, made to be captured in a CUDA graph.

At a batch of 1 to 16 a step is bound by reading the weights, and between kernels the card reads nothing: so each kernel takes in
what its neighbours would do. `_in_proj` normalises the residual stream as it reads it, and convolves and shifts the window as
it writes; `_scan` forms the step sizes (dt_proj), moves the state and applies the gate; `_out_proj` adds to the residual
stream; `_head` leaves each block's best token for `_choose`, which picks one and embeds it for the next step. Activations are
rounded to the weights' dtype where the model's forward rounds them; sums and the residual stream are float32.

Up to `FEW` rows a product is a sum over columns for each row, so a row's bits do not depend on the others as long as the
number of rows the step was made for is the same; more rows use the tensor cores. int8 and int4 weights are widened in registers
as they are read, up to `FEW` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambakit.ops.decode.weights import LayerWeights, ModelWeights, check_states, shape_of, tensors_of

FEW = 4  # rows up to which products are sums on the ordinary cores
MOST_ROWS = 32  # beyond, the model's own forward as a graph is faster: cuBLAS, and the states by the scan's kernel (docs/kernels.md)


def most_rows(width: int) -> int:
    """Rows up to which these kernels are the faster ones: at width 2560 they take 5.9 ms for 32 rows, the forward 5.2 for 64 (an H100)."""
    return MOST_ROWS if width < 2560 else 16


@triton.jit
def _products(
    x, x_stride, norm, weight, n, n_mask, begin, rows,
    K: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of weight rows n and rows of x over columns [begin, begin + COLUMNS), and (BB,) sums of x^2."""
    b = tl.arange(0, BB)
    dtype = weight.dtype.element_ty
    if DOT:
        total = tl.zeros((BN, BB), tl.float32)
        squares = tl.zeros((BK, BB), tl.float32)
    else:
        total = tl.zeros((BN, BB, BK), tl.float32)
        squares = tl.zeros((BB, BK), tl.float32)
    for k0 in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        k = begin + k0 + tl.arange(0, BK)
        inside = (k < K) & (k < begin + COLUMNS)
        w = tl.load(
            weight + n[:, None].to(tl.int64) * K + k[None, :], mask=n_mask[:, None] & inside[None, :], other=0.0
        )
        if DOT:
            values = tl.load(
                x + b[None, :] * x_stride + k[:, None], mask=(b < rows)[None, :] & inside[:, None], other=0.0
            )
        else:
            values = tl.load(
                x + b[:, None] * x_stride + k[None, :], mask=(b < rows)[:, None] & inside[None, :], other=0.0
            )
        if NORMED:
            values = values.to(tl.float32)
            squares += values * values
            scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
            values = values * scale[:, None] if DOT else values * scale[None, :]
        if DOT:
            total = tl.dot(w, values.to(dtype), total, input_precision="ieee")
        else:
            total += w.to(tl.float32)[:, None, :] * values.to(tl.float32)[None, :, :]
    if DOT:
        sums = tl.sum(squares, axis=0)
    else:
        total = tl.sum(total, axis=2)
        sums = tl.sum(squares, axis=1)
    return total, sums


@triton.jit
def _integer_products(
    x, x_stride, norm, weight, scales, n, n_mask, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of rows n of an int8 or int4 weight and rows of x, and (BB,) sums of x^2. Layouts: `mambakit.ops.linear.api`.

    An integer becomes a float without a conversion: as the low bits of 2^23, which is then subtracted.
    """
    UNIT: tl.constexpr = 32 if BITS == 8 else 64  # columns that lie together; all of an int8 unit has one scale
    WORDS: tl.constexpr = 32 if BITS == 8 else 16  # what holds them
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
def _in_proj(
    residual, norm, weight, scales, bias, conv_state, conv, conv_bias, u, z, eps, rows,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < 2 * D
    if BITS:
        xz, squares = _integer_products(
            residual, H, norm, weight, scales, n, n_mask, rows, H, BITS, GROUP, BB, BK, BN, True, STAGES
        )  # fmt: skip
    else:
        xz, squares = _products(
            residual, H, norm, weight, n, n_mask, 0, rows, H, H, BB, BK, BN, True, DOT, STAGES
        )  # fmt: skip
    xz *= tl.rsqrt(squares / H + eps)[None, :]
    if HAS_BIAS:
        xz += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    dtype = u.dtype.element_ty
    xz = xz.to(dtype).to(tl.float32)
    row = b[None, :].to(tl.int64)
    valid = (b < rows)[None, :]
    is_x = n < D
    mask = is_x[:, None] & valid
    y = xz * tl.load(conv + n * WIDTH + (WIDTH - 1), mask=is_x, other=0.0).to(tl.float32)[:, None]
    if HAS_CONV_BIAS:
        y += tl.load(conv_bias + n, mask=is_x, other=0.0).to(tl.float32)[:, None]
    window = conv_state + (row * D + n[:, None]) * (WIDTH - 1)
    for j in tl.static_range(WIDTH - 1):
        past = tl.load(window + j, mask=mask, other=0.0).to(tl.float32)
        y += past * tl.load(conv + n * WIDTH + j, mask=is_x, other=0.0).to(tl.float32)[:, None]
        if j > 0:
            tl.store(window + (j - 1), past.to(conv_state.dtype.element_ty), mask=mask)
    tl.store(window + (WIDTH - 2), xz.to(conv_state.dtype.element_ty), mask=mask)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + row * D + n[:, None], y.to(dtype), mask=mask)
    tl.store(z + row * D + (n[:, None] - D), xz.to(dtype), mask=(n_mask & (n >= D))[:, None] & valid)


@triton.jit
def _x_proj(
    u, weight, scales, parts, rows,
    R: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """parts (splits, rows, R): each split of the columns leaves its share, and the reader adds them in order."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    if BITS:
        total, _ = _integer_products(
            u, D, u, weight, scales, n, n < R, rows, D, BITS, GROUP, BB, BK, BN, False, STAGES
        )  # fmt: skip
    else:
        total, _ = _products(
            u, D, u, weight, n, n < R, split * COLUMNS, rows, D, COLUMNS, BB, BK, BN, False, DOT, STAGES
        )  # fmt: skip
    tl.store(parts + (split * rows + b[None, :]) * R + n[:, None], total, mask=(n < R)[:, None] & (b < rows)[None, :])


@triton.jit
def _scan(
    parts, dt_proj, dt_bias, A_log, D_skip, u, z, state, y, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    d_mask = d < D
    j = tl.arange(0, BR)
    i = tl.arange(0, BS)
    # Weights: they do not wait for the kernel before.
    w = tl.load(dt_proj + d[:, None] * RANK + j[None, :], mask=d_mask[:, None] & (j < RANK)[None, :], other=0.0)
    n_mask = d_mask[:, None] & (i < N)[None, :]
    A = -tl.exp(tl.load(A_log + d[:, None] * N + i[None, :], mask=n_mask, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    skip = tl.load(D_skip + d, mask=d_mask, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
    dtype = y.dtype.element_ty
    for r in tl.static_range(ROWS):
        b = (tl.program_id(1) * ROWS + r).to(tl.int64)
        if b < rows:
            dt = tl.zeros((BR,), tl.float32)
            B = tl.zeros((BS,), tl.float32)
            C = tl.zeros((BS,), tl.float32)
            for split in tl.static_range(SPLITS):
                p = parts + (split * rows + b) * R
                dt += tl.load(p + j, mask=j < RANK, other=0.0)
                B += tl.load(p + RANK + i, mask=i < N, other=0.0)
                C += tl.load(p + RANK + N + i, mask=i < N, other=0.0)
            dt, B, C = dt.to(dtype).to(tl.float32), B.to(dtype).to(tl.float32), C.to(dtype).to(tl.float32)
            delta = tl.sum(w.to(tl.float32) * dt[None, :], axis=1).to(dtype).to(tl.float32) + bias
            delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
            x = tl.load(u + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
            gate = tl.load(z + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
            place = state + (b * D + d)[:, None] * N + i[None, :]
            h = tl.load(place, mask=n_mask, other=0.0)
            h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
            tl.store(place, h, mask=n_mask)
            out = tl.sum(h * C[None, :], axis=1) + skip * x
            out = out * gate / (1.0 + tl.exp(-gate))
            tl.store(y + b * D + d, out.to(dtype), mask=d_mask)


@triton.jit
def _out_proj(
    y, weight, scales, bias, residual, rows,
    H: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < H
    if BITS:
        total, _ = _integer_products(
            y, D, y, weight, scales, n, n_mask, rows, D, BITS, GROUP, BB, BK, BN, False, STAGES
        )  # fmt: skip
    else:
        total, _ = _products(y, D, y, weight, n, n_mask, 0, rows, D, D, BB, BK, BN, False, DOT, STAGES)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    place = residual + b[None, :] * H + n[:, None]
    mask = n_mask[:, None] & (b < rows)[None, :]
    total = total.to(y.dtype.element_ty).to(tl.float32)
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def _head(
    residual, norm, weight, scales, logits, best, best_token, eps, rows,
    H: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32; best, best_token (rows, BLOCKS): the largest logit of each block, and the first to reach it."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < V
    if BITS:
        total, squares = _integer_products(
            residual, H, norm, weight, scales, n, n_mask, rows, H, BITS, GROUP, BB, BK, BN, True, STAGES
        )  # fmt: skip
    else:
        total, squares = _products(residual, H, norm, weight, n, n_mask, 0, rows, H, H, BB, BK, BN, True, DOT, STAGES)
    total = (total * tl.rsqrt(squares / H + eps)[None, :]).to(norm.dtype.element_ty).to(tl.float32)
    row = b[None, :].to(tl.int64)
    tl.store(logits + row * V + n[:, None], total, mask=n_mask[:, None] & (b < rows)[None, :])
    candidates = tl.where(n_mask[:, None], total, float("-inf"))
    largest = tl.max(candidates, axis=0)
    token = tl.min(tl.where(candidates == largest[None, :], n[:, None], V), axis=0)
    place = b * BLOCKS + tl.program_id(0)
    tl.store(best + place, largest, mask=b < rows)
    tl.store(best_token + place, token, mask=b < rows)


@triton.jit
def _choose(
    best, best_token, tokens, history, position, capacity,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The most probable token of each row: tokens (rows,), and history (rows, capacity) at position[0]."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    values = tl.load(best + b * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
    numbers = tl.load(best_token + b * BLOCKS + i, mask=i < BLOCKS, other=2147483647)
    token = tl.min(tl.where(values == tl.max(values, axis=0), numbers, 2147483647), axis=0).to(tl.int64)
    tl.store(tokens + b, token)
    at = tl.load(position) - 1  # _embed has counted this step
    tl.store(history + b * capacity + at, token, mask=at < capacity)


@triton.jit
def _embed(tokens, embeddings, residual, position, H: tl.constexpr, SIZE: tl.constexpr, CHAINED: tl.constexpr):
    """residual (rows, H) float32 from the tokens; one more position."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    token = tl.load(tokens + b)
    value = tl.load(embeddings + token * H + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(residual + b * H + i, value, mask=i < H)
    if b == 0:
        tl.store(position, tl.load(position) + 1)


@dataclass(frozen=True)
class Tile:
    """How a product is cut: BN rows and BK columns of the weight a time, by so many warps, loads so many stages ahead."""

    BN: int
    BK: int
    warps: int
    stages: int


def _tiles(rows: int, h: int, d: int) -> dict[str, Tile]:
    """Measured on an H100 (docs/kernels.md). Few rows: as many programs as it takes to keep all of the memory busy."""
    if rows <= FEW:
        columns = 256
        wide = h >= 1536
        return {
            "in_proj": Tile(8, columns, 2 if rows == 1 else 4, 3),
            "x_proj": Tile(1, columns, 8, 3),
            "out_proj": Tile(8, columns, 4, 3) if wide else Tile(2, 2 * columns, 4, 3),
            "head": Tile(16 if wide else 8, columns, 4, 3),
        }
    return {
        "in_proj": Tile(64, 64, 4, 4),
        "x_proj": Tile(16, 128, 4, 3),
        "out_proj": Tile(16, 128, 4, 4),
        "head": Tile(128, 64, 4, 4),
    }


class DecodeStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    Everything lies in buffers of the step's own, so that a CUDA graph can hold the call. With ``choose`` the most probable
    token of each row becomes the next step's token, and step i (``position`` counts them) keeps it in ``history[:, i]``.

    Args:
        weights: the model's, read where they are at every step.
        conv_states, ssm_states: (layers, rows, d, k - 1) and (layers, rows, d, n) float32, contiguous.
        capacity: of ``history``.
        tiles: replaces how the products named ("in_proj", "x_proj", "out_proj", "head") are cut.
        chained: start each kernel while the one before ends (programmatic dependent launch; Hopper and later). Measured on
            an H100 it made steps 4 to 9 % longer, so it is off.

    Raises:
        ValueError: states that cannot be updated in place, too many rows, or large weights of different kinds.
    """

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        tiles: dict[str, Tile] | None = None,
        chained: bool = False,
    ):
        rows = ssm_states.shape[1]
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"DecodeStep: {rows} rows; it serves 1 to {MOST_ROWS}, split larger batches")
        check_states(conv_states, ssm_states)
        self._kind = weights.kind
        if self._kind and rows > FEW:
            raise ValueError(f"DecodeStep: {rows} rows with packed weights; it serves 1 to {FEW} of them")
        self.layers, self.embeddings, self.final_norm = weights.layers, weights.embeddings, weights.final_norm
        self.head, self.eps = weights.head, weights.eps
        self.conv_states, self.ssm_states, self.rows = conv_states, ssm_states, rows
        device, dtype = self.embeddings.device, self.layers[0].dt_proj.dtype
        (v, h), (r, d) = shape_of(self.head), shape_of(self.layers[0].x_proj)
        self.tiles = _tiles(rows, h, d) | (tiles or {})
        self._dot = rows > FEW
        self._bb = max(16, triton.next_power_of_2(rows)) if self._dot else triton.next_power_of_2(rows)
        self._chained = chained
        # With tensor cores a product's rows are too few to fill the card: its columns are split, too.
        self._splits = min(8, triton.cdiv(d, 512)) if self._dot else 1
        self._columns = triton.cdiv(triton.cdiv(d, self._splits), self.tiles["x_proj"].BK) * self.tiles["x_proj"].BK
        self._splits = triton.cdiv(d, self._columns)
        self._blocks = triton.cdiv(v, self.tiles["head"].BN)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.tokens, self.position = buffer(rows, dtype=torch.int64), buffer(1, dtype=torch.int64)
        self.history = buffer(rows, max(1, capacity), dtype=torch.int64)
        self.logits = buffer(rows, v)
        self._residual, self._parts = buffer(rows, h), buffer(self._splits, rows, r)
        self._u, self._z, self._y = (buffer(rows, d, dtype=dtype) for _ in range(3))
        self._best, self._best_token = buffer(rows, self._blocks), buffer(rows, self._blocks, dtype=torch.int32)

    def __call__(self, choose: bool = False) -> Tensor:
        h = self.final_norm.shape[0]
        rows, chained = self.rows, {"CHAINED": self._chained}
        if self._chained:
            chained["launch_pdl"] = True
        _embed[(rows,)](
            self.tokens, self.embeddings, self._residual, self.position, h, triton.next_power_of_2(h), **chained
        )
        for i, w in enumerate(self.layers):
            self._layer(w, self.conv_states[i], self.ssm_states[i], chained)
        tile = self.tiles["head"]
        v = self.logits.shape[1]
        _head[(self._blocks,)](
            self._residual, self.final_norm, *tensors_of(self.head), self.logits, self._best, self._best_token, self.eps, rows,
            h, v, self._blocks, **self._cut(tile), **chained,
        )  # fmt: skip
        if choose:
            _choose[(rows,)](
                self._best, self._best_token, self.tokens, self.history, self.position, self.history.shape[1],
                self._blocks, triton.next_power_of_2(self._blocks), **chained,
            )  # fmt: skip
        return self.logits

    def _cut(self, tile: Tile) -> dict[str, int | bool]:
        return {
            "BB": self._bb, "BK": max(64, tile.BK) if self._kind else tile.BK, "BN": tile.BN, "DOT": self._dot,
            "STAGES": tile.stages, "BITS": self._kind[0] if self._kind else 0, "GROUP": self._kind[1] if self._kind else 0,
            "num_warps": tile.warps,
        }  # fmt: skip

    def _layer(self, w: LayerWeights, conv_state: Tensor, state: Tensor, chained: dict) -> None:
        rows, h, (r, d) = self.rows, self.final_norm.shape[0], shape_of(w.x_proj)
        width, n, rank = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1]
        tile = self.tiles["in_proj"]
        _in_proj[(triton.cdiv(2 * d, tile.BN),)](
            self._residual, w.norm, *tensors_of(w.in_proj), w.in_proj_bias, conv_state, w.conv, w.conv_bias, self._u, self._z,
            self.eps, rows, h, d, width, HAS_BIAS=w.in_proj_bias is not None, HAS_CONV_BIAS=w.conv_bias is not None,
            **self._cut(tile), **chained,
        )  # fmt: skip
        tile = self.tiles["x_proj"]
        _x_proj[(triton.cdiv(r, tile.BN), self._splits)](
            self._u, *tensors_of(w.x_proj), self._parts, rows, r, d, self._columns, **self._cut(tile), **chained
        )
        block_rows = 1 if rows <= FEW else 4
        channels = 16
        _scan[(triton.cdiv(d, channels), triton.cdiv(rows, block_rows))](
            self._parts, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, self._z, state, self._y, rows,
            r, d, rank, n, self._splits, BD=channels, BR=triton.next_power_of_2(rank), BS=triton.next_power_of_2(n),
            ROWS=block_rows, num_warps=2, **chained,
        )  # fmt: skip
        tile = self.tiles["out_proj"]
        _out_proj[(triton.cdiv(h, tile.BN),)](
            self._y, *tensors_of(w.out_proj), w.out_proj_bias, self._residual, rows, h, d,
            HAS_BIAS=w.out_proj_bias is not None, **self._cut(tile), **chained,
        )  # fmt: skip
