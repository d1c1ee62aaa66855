"""One token for up to 4 rows through a whole Mamba model on a GPU, in Triton: four kernels a layer, made to be captured in a CUDA graph.

It serves what the persistent kernel does not (float32, other state sizes). A step is bound by reading the weights, and between kernels
the card reads nothing: so each kernel takes in what its neighbours would do. `_in_proj` normalises the residual stream as it reads it,
and convolves and shifts the window as it writes; `_scan` forms the step sizes (dt_proj), moves the state and applies the gate;
`_out_proj` adds to the residual stream; `_head` leaves each block's best token for `triton_tokens.py` to choose from. Activations are
rounded to the weights' dtype where the model's forward rounds them; sums and the residual stream are float32.

A product is a sum over columns for each row, so a row's bits do not depend on the others as long as the number of rows the step was
made for is the same. int8 and int4 weights are widened in registers as they are read.
"""

# A kernel's tuple of tensors grows by concatenation, the form Triton compiles; types there are Triton's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops._sums import ALIKE
from mambakit.ops.decode.triton_tokens import TokenBuffers
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, check_states, shape_of, tensors_of

MOST_ROWS = 4


@triton.jit
def _float_products(
    x, x_stride, norm, weight, n, n_mask, rows,
    K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of weight rows n and rows of x, and (BB,) sums of x^2."""
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
        total += w.to(tl.float32)[:, None, :] * values[None, :, :]
    return tl.sum(total, axis=2), tl.sum(squares, axis=1)


@triton.jit
def _integer_products(
    x, x_stride, norm, weight, scales, n, n_mask, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of rows n of an int8 or int4 weight and rows of x, and (BB,) sums of x^2. Layouts: `mambakit.ops.linear.packed`.

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
def _products(
    x, x_stride, norm, weight, scales, n, n_mask, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(BN, BB) products of weight rows n and rows of x, and (BB,) sums of x^2; BITS 0: a floating weight."""
    if BITS:
        total, squares = _integer_products(
            x, x_stride, norm, weight, scales, n, n_mask, rows, K, BITS, GROUP, BB, BK, BN, NORMED, STAGES
        )  # fmt: skip
    else:
        total, squares = _float_products(x, x_stride, norm, weight, n, n_mask, rows, K, BB, BK, BN, NORMED, STAGES)
    return total, squares


@triton.jit
def _in_proj(
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
    # What the product does not need is asked for before it, so that nothing is waited for at its end.
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
    tl.debug_barrier()  # all have read what is written over: several threads hold each element of a small tile
    for j in tl.static_range(WIDTH - 1):
        tl.store(window + j, inputs[j + 1].to(conv_state.dtype.element_ty), mask=mask)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + row * D + n[:, None], y.to(dtype), mask=mask)
    tl.store(z + row * D + (n[:, None] - D), xz.to(dtype), mask=(n_mask & (n >= D))[:, None] & valid)


@triton.jit
def _x_proj(
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
def _scan(
    sums, dt_proj, dt_bias, A_log, D_skip, u, z, state, y, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
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
    delta = tl.sum(w.to(tl.float32) * dt[None, :], axis=1).to(dtype).to(tl.float32) + bias
    delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
    x = tl.load(u + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    gate = tl.load(z + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    h = tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
    tl.debug_barrier()  # as in _in_proj
    tl.store(place, h, mask=n_mask)
    out = tl.sum(h * C[None, :], axis=1) + skip * x
    out = out * gate / (1.0 + tl.exp(-gate))
    tl.store(y + b * D + d, out.to(dtype), mask=d_mask)


@triton.jit
def _out_proj(
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
    tl.debug_barrier()  # as in _in_proj
    tl.store(place, stream, mask=mask)


@triton.jit
def _head(
    residual, norm, weight, scales, logits, best, best_token, eps, rows,
    H: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32; best, best_token (rows, BLOCKS): the largest logit of each block, and the first to reach it."""
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


@dataclass(frozen=True)
class Tile:
    """How a product is cut: BN rows and BK columns of the weight a time, by so many warps, loads so many stages ahead."""

    BN: int
    BK: int
    warps: int
    stages: int


def _tiles(rows: int, h: int) -> dict[str, Tile]:
    """Measured on an H100 (docs/kernels/decode.md): as many programs as it takes to keep all of the memory busy."""
    columns, wide = 256, h >= 1536
    return {
        "in_proj": Tile(8, columns, 2 if rows == 1 else 4, 3),
        "x_proj": Tile(1, columns, 8, 3),
        "out_proj": Tile(8, columns, 4, 3) if wide else Tile(2, 2 * columns, 4, 3),
        "head": Tile(16 if wide else 8, columns, 4, 3),
    }


class FewRowsStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    Everything lies in buffers of the step's own, so that a CUDA graph can hold the call. With ``choose`` the most probable
    token of each row becomes the next step's token, and step i (``position`` counts them) keeps it in ``history[:, i]``.

    Args:
        weights: the model's, read where they are at every step.
        conv_states, ssm_states: (layers, rows, d, k - 1) and (layers, rows, d, n) float32, contiguous.
        capacity: of ``history``.
        tiles: replaces how the products named ("in_proj", "x_proj", "out_proj", "head") are cut.

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
    ):
        rows = ssm_states.shape[1]
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"FewRowsStep: {rows} rows; it serves 1 to {MOST_ROWS}, split larger batches")
        check_states(conv_states, ssm_states)
        self._kind = weights.kind
        self.layers, self.embeddings, self.final_norm = weights.layers, weights.embeddings, weights.final_norm
        self.head, self.eps = weights.head, weights.eps
        self.conv_states, self.ssm_states, self.rows = conv_states, ssm_states, rows
        device, dtype = self.embeddings.device, self.layers[0].dt_proj.dtype
        (v, h), (r, d) = shape_of(self.head), shape_of(self.layers[0].x_proj)
        self.tiles = _tiles(rows, h) | (tiles or {})
        self._bb = triton.next_power_of_2(rows)
        self._blocks = triton.cdiv(v, self.tiles["head"].BN)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self._ends = TokenBuffers(rows, v, self._blocks, capacity, device)
        self.tokens, self.position, self.history = self._ends.tokens, self._ends.position, self._ends.history
        self.logits = self._ends.logits
        self._residual, self._sums = buffer(rows, h), buffer(rows, r)
        self._u, self._z, self._y = (buffer(rows, d, dtype=dtype) for _ in range(3))

    def __call__(self, choose: bool = False) -> Tensor:
        h = self.final_norm.shape[0]
        rows = self.rows
        self._ends.embed(self.embeddings, self._residual)
        for i, w in enumerate(self.layers):
            self._layer(w, self.conv_states[i], self.ssm_states[i])
        tile = self.tiles["head"]
        v = self.logits.shape[1]
        _head[(self._blocks,)](
            self._residual, self.final_norm, *tensors_of(self.head), self.logits, self._ends.best, self._ends.best_token, self.eps, rows,
            h, v, self._blocks, **self._cut(tile),
        )  # fmt: skip
        if choose:
            self._ends.choose()
        return self.logits

    def _cut(self, tile: Tile) -> dict[str, int | bool]:
        return {
            "BB": self._bb, "BK": max(64, tile.BK) if self._kind else tile.BK, "BN": tile.BN,
            "STAGES": tile.stages, "BITS": self._kind[0] if self._kind else 0, "GROUP": self._kind[1] if self._kind else 0,
            "num_warps": tile.warps,
        }  # fmt: skip

    def _layer(self, w: LayerWeights, conv_state: Tensor, state: Tensor) -> None:
        rows, h, (r, d) = self.rows, self.final_norm.shape[0], shape_of(w.x_proj)
        width, n, rank = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1]
        tile = self.tiles["in_proj"]
        _in_proj[(triton.cdiv(2 * d, tile.BN),)](
            self._residual, w.norm, *tensors_of(w.in_proj), w.in_proj_bias, conv_state, w.conv, w.conv_bias, self._u, self._z,
            self.eps, rows, h, d, width, HAS_BIAS=w.in_proj_bias is not None, HAS_CONV_BIAS=w.conv_bias is not None,
            **self._cut(tile),
        )  # fmt: skip
        tile = self.tiles["x_proj"]
        _x_proj[(triton.cdiv(r, tile.BN),)](self._u, *tensors_of(w.x_proj), self._sums, rows, r, d, **self._cut(tile))
        channels = 16
        _scan[(triton.cdiv(d, channels), rows)](
            self._sums, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, self._z, state, self._y, rows,
            r, d, rank, n, BD=channels, BR=triton.next_power_of_2(rank), BS=triton.next_power_of_2(n), num_warps=2, **ALIKE,
        )  # fmt: skip
        tile = self.tiles["out_proj"]
        _out_proj[(triton.cdiv(h, tile.BN),)](
            self._y, *tensors_of(w.out_proj), w.out_proj_bias, self._residual, rows, h, d,
            HAS_BIAS=w.out_proj_bias is not None, **self._cut(tile),
        )  # fmt: skip
