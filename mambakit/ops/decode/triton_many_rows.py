"""One token for each of up to 128 rows through a whole Mamba model on a GPU, in Triton: six kernels a layer, products on the tensor cores.

`_product` multiplies all rows by a weight and leaves float32 shares of its columns, which whoever reads them adds in order: `_conv`
convolves in_proj's x and shifts the window, `_scan` forms the step sizes (dt_proj) from x_proj's, moves the state and applies the
gate, `_norm` adds out_proj's to the residual stream and normalises it. `_head` leaves each block's best token. Activations are
rounded to the weights' dtype where the model's forward rounds them; sums and the residual stream are float32. How products are cut
does not depend on what the rows hold, so a row's bits are its own as long as the number of rows stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops._sums import ALIKE
from mambakit.ops.decode.triton_tokens import TokenBuffers
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, Weight, check_states, shape_of

MOST_ROWS = 128


def most_rows(width: int, dtype: torch.dtype) -> int:
    """Rows up to which these kernels are the faster ones, beside the model's forward as a graph: measured on an H100 in bfloat16
    (docs/kernels/decode.md). In float32, where the tensor cores do not multiply, not measured: as many as Triton's kernels before served."""
    if dtype == torch.float32:
        return 32 if width < 2560 else 16
    return MOST_ROWS if width < 2560 else 64


@triton.jit
def _total(
    x, weight, n, begin, K: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(BB, BN) products of all rows of x and rows n of the weight over columns [begin, begin + COLUMNS)."""
    b = tl.arange(0, BB)
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
def _product(
    x, weight, parts, rows,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """parts (splits, rows, N) float32: each split of the columns leaves its share of x weight^T."""
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    total = _total(x, weight, tl.minimum(n, N - 1), split * COLUMNS, K, COLUMNS, BB, BK, BN, STAGES)
    mask = (b < rows)[:, None] & (n < N)[None, :]
    tl.store(parts + (split * rows + b[:, None]) * N + n[None, :], total, mask=mask)


@triton.jit
def _conv(
    parts, bias, conv_state, conv, conv_bias, u, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """u (rows, D) from in_proj's shares; the window moves on by one."""
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
    tl.debug_barrier()  # as in _norm
    moved = mask[:, :, None] & ((j > 0) & (j < WIDTH))[None, None, :]
    tl.store(place - 1, window.to(conv_state.dtype.element_ty), mask=moved)
    y = y / (1.0 + tl.exp(-y))
    tl.store(u + at, y.to(dtype), mask=mask)


@triton.jit
def _scan(
    parts, xz, bias, dt_proj, dt_bias, A_log, D_skip, u, state, y, rows,
    R: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, XZ_SPLITS: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d_mask, b_mask = d < D, b < rows
    j = tl.arange(0, BR)
    i = tl.arange(0, BS)
    # Channels before rows: what lies side by side in memory is then read side by side.
    both = d_mask[:, None] & b_mask[None, :]
    n_mask = i < N
    mask = both[:, :, None] & n_mask[None, None, :]
    at = b[None, :].to(tl.int64) * D + d[:, None]
    place = state + at[:, :, None] * N + i[None, None, :]
    h = tl.load(place, mask=mask, other=0.0)
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
    for split in tl.range(SPLITS):  # not unrolled: ptxas then keeps all of it in memory
        p = parts + (split * rows + b[:, None]) * R
        dt += tl.load(p + j[None, :], mask=b_mask[:, None] & (j < RANK)[None, :], other=0.0)
        B += tl.load(p + RANK + i[None, :], mask=b_mask[:, None] & n_mask[None, :], other=0.0)
        C += tl.load(p + RANK + N + i[None, :], mask=b_mask[:, None] & n_mask[None, :], other=0.0)
    B, C = B.to(dtype).to(tl.float32), C.to(dtype).to(tl.float32)
    delta = tl.dot(w.to(dtype), dt.to(dtype).T, input_precision="ieee").to(dtype).to(tl.float32) + delta_bias[:, None]
    delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(delta)))
    h = tl.exp(delta[:, :, None] * A[:, None, :]) * h + (delta * x)[:, :, None] * B[None, :, :]
    tl.store(place, h, mask=mask)
    out = tl.sum(h * C[None, :, :], axis=2) + skip[:, None] * x
    out = out * gate / (1.0 + tl.exp(-gate))
    tl.store(y + at, out.to(dtype), mask=both)


@triton.jit
def _norm(
    parts, bias, residual, norm, x, eps, rows,
    H: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x (rows, H): the normalised residual stream, to which the shares of out_proj's product are added first."""
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
        tl.debug_barrier()  # all have read what is written over: several threads hold each element of a small tile
        tl.store(residual + b * H + i, stream, mask=mask)
    scale = tl.load(norm + i, mask=mask, other=0.0).to(tl.float32)
    normed = stream * tl.rsqrt(tl.sum(stream * stream, axis=0) / H + eps) * scale
    tl.store(x + b * H + i, normed.to(dtype), mask=mask)


@triton.jit
def _head(
    x, weight, logits, best, best_token, rows,
    H: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32; best, best_token (rows, BLOCKS): the largest logit of each block, and the first to reach it."""
    b = tl.arange(0, BB)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = (n < V)[None, :]
    total = _total(x, weight, tl.minimum(n, V - 1), 0, H, H, BB, BK, BN, STAGES)
    total = total.to(x.dtype.element_ty).to(tl.float32)
    tl.store(logits + b[:, None].to(tl.int64) * V + n[None, :], total, mask=n_mask & (b < rows)[:, None])
    candidates = tl.where(n_mask, total, float("-inf"))
    largest = tl.max(candidates, axis=1)
    token = tl.min(tl.where(candidates == largest[:, None], n[None, :], V - 1), axis=1)
    place = b * BLOCKS + tl.program_id(0)
    tl.store(best + place, largest, mask=b < rows)
    tl.store(best_token + place, token, mask=b < rows)


@dataclass(frozen=True)
class Product:
    """How a product is cut: BN rows and BK columns of the weight a time, by so many warps, loads so many stages ahead, all its columns
    among so many programs."""

    BN: int
    BK: int
    warps: int
    stages: int
    splits: int = 1

    def within(self, rows: int, itemsize: int, limit: int) -> Product:
        """With fewer stages, or narrower, until the stages' tiles fit ``limit`` bytes of shared memory."""
        plan = self
        # Triton keeps a tile less than there are stages, but as many for Hopper's products of whole warp groups.
        while plan.stages * (plan.BN + rows) * plan.BK * itemsize > limit and (plan.stages, plan.BK) != (2, 16):
            stages, columns = (plan.stages - 1, plan.BK) if plan.stages > 2 else (plan.stages, plan.BK // 2)
            plan = replace(plan, stages=stages, BK=columns)
        return plan


@dataclass(frozen=True)
class Tile:
    """What a program of the convolution or the scan takes: so many channels of so many rows, by so many warps."""

    channels: int
    rows: int
    warps: int


def plans(rows: int, state_size: int) -> dict[str, Product | Tile]:
    """Measured on an H100 with 1.4b's layers (docs/kernels/decode.md)."""
    if rows <= 64:
        products = {
            "in_proj": Product(64, 128, 4, 5),
            "out_proj": Product(32, 128, 4, 6, 2),
            "head": Product(128, 64, 4, 4),
        }
        products["x_proj"] = Product(16, 128, 4, 4, 8 if rows <= 32 else 4)
    else:
        products = {
            "in_proj": Product(64, 64, 4, 6),
            "out_proj": Product(64, 64, 4, 6, 4),
            "head": Product(128, 64, 8, 4),
        }
        products["x_proj"] = Product(16, 64, 4, 6, 4)
    scan = Tile(16, 4, 4 if rows <= 8 else 2) if rows <= 16 else Tile(64, 4, 4)
    while scan.channels * scan.rows * state_size > 8192:  # what a program holds in registers
        scan = replace(scan, rows=scan.rows // 2) if scan.rows > 1 else replace(scan, channels=scan.channels // 2)
    conv = Tile(64, 1 if rows <= 16 else 2, 4) if rows <= 32 else Tile(128, 1, 2)
    return products | {"conv": conv, "scan": scan}


class ManyRowsStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    Everything lies in buffers of the step's own, so that a CUDA graph can hold the call. With ``choose`` the most probable
    token of each row becomes the next step's token, and step i (``position`` counts them) keeps it in ``history[:, i]``.

    Args:
        weights: the model's, read where they are at every step; all of one floating dtype.
        conv_states, ssm_states: (layers, rows, d, k - 1) and (layers, rows, d, n) float32, contiguous.
        capacity: of ``history``.
        chosen: plans in place of those of `plans`, by name.

    Raises:
        ValueError: states that cannot be updated in place, too many rows, or packed weights.
    """

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        chosen: dict[str, Product | Tile] | None = None,
    ):
        rows, n = ssm_states.shape[1], ssm_states.shape[3]
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"ManyRowsStep: {rows} rows; it serves 1 to {MOST_ROWS}, split larger batches")
        check_states(conv_states, ssm_states)
        if weights.kind is not None:
            raise ValueError("ManyRowsStep reads floating weights, and these are packed; FewRowsStep serves them")
        self.layers, self.embeddings, self.final_norm = weights.layers, weights.embeddings, weights.final_norm
        self.head, self.eps = weights.head, weights.eps
        self.conv_states, self.ssm_states, self.rows = conv_states, ssm_states, rows
        device, dtype = self.embeddings.device, self.layers[0].dt_proj.dtype
        (v, h), (r, d) = shape_of(self.head), shape_of(self.layers[0].x_proj)
        self._padded = max(16, triton.next_power_of_2(rows))  # a product reads whole tiles of rows
        self._plans = plans(rows, n) | (chosen or {})
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            limit = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] - 4096
            for name, plan in self._plans.items():
                if isinstance(plan, Product):
                    self._plans[name] = plan.within(self._padded, dtype.itemsize, limit)
        self._columns: dict[str, int] = {}
        for name, k in (("in_proj", h), ("x_proj", d), ("out_proj", d)):
            plan = self._product_plan(name)
            self._columns[name] = triton.cdiv(triton.cdiv(k, plan.splits), plan.BK) * plan.BK
        self._splits = {
            name: triton.cdiv(k, self._columns[name]) for name, k in (("in_proj", h), ("x_proj", d), ("out_proj", d))
        }
        self._blocks = triton.cdiv(v, self._product_plan("head").BN)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self._ends = TokenBuffers(rows, v, self._blocks, capacity, device)
        self.tokens, self.position, self.history = self._ends.tokens, self._ends.position, self._ends.history
        self.logits = self._ends.logits
        self._residual = buffer(rows, h)
        self._shares = {
            name: buffer(self._splits[name], rows, width)
            for name, width in (("in_proj", 2 * d), ("x_proj", r), ("out_proj", h))
        }
        self._x = buffer(self._padded, h, dtype=dtype)
        self._u, self._y = (buffer(self._padded, d, dtype=dtype) for _ in range(2))

    def __call__(self, choose: bool = False) -> Tensor:
        rows, (v, h) = self.rows, shape_of(self.head)
        self._ends.embed(self.embeddings, self._residual)
        self._normalise(self.layers[0].norm, None, 0)
        norms = [w.norm for w in self.layers[1:]] + [self.final_norm]
        for i, (w, norm) in enumerate(zip(self.layers, norms, strict=True)):
            self._layer(w, self.conv_states[i], self.ssm_states[i])
            self._normalise(norm, w.out_proj_bias, self._splits["out_proj"])
        plan = self._product_plan("head")
        _head[(self._blocks,)](
            self._x, self.head, self.logits, self._ends.best, self._ends.best_token, rows, h, v, self._blocks,
            BB=self._padded, BK=plan.BK, BN=plan.BN, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
        if choose:
            self._ends.choose()
        return self.logits

    def _layer(self, w: LayerWeights, conv_state: Tensor, state: Tensor) -> None:
        rows, (r, d) = self.rows, shape_of(w.x_proj)
        width, n, rank = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1]
        bias = w.in_proj_bias
        self._multiply("in_proj", self._x, w.in_proj)
        tile = self._tile("conv")
        _conv[(triton.cdiv(d, tile.channels), triton.cdiv(rows, tile.rows))](
            self._shares["in_proj"], bias, conv_state, w.conv, w.conv_bias, self._u, rows,
            d, width, triton.next_power_of_2(width), self._splits["in_proj"], BD=tile.channels, ROWS=tile.rows,
            HAS_BIAS=bias is not None, HAS_CONV_BIAS=w.conv_bias is not None, num_warps=tile.warps, **ALIKE,
        )  # fmt: skip
        self._multiply("x_proj", self._u, w.x_proj)
        tile = self._tile("scan")
        _scan[(triton.cdiv(d, tile.channels), triton.cdiv(rows, tile.rows))](
            self._shares["x_proj"], self._shares["in_proj"], bias, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, state, self._y,
            rows, r, d, rank, n, self._splits["x_proj"], self._splits["in_proj"], BD=tile.channels,
            BR=max(16, triton.next_power_of_2(rank)), BS=triton.next_power_of_2(n), ROWS=tile.rows, HAS_BIAS=bias is not None,
            num_warps=tile.warps, **ALIKE,
        )  # fmt: skip
        self._multiply("out_proj", self._y, w.out_proj)

    def _multiply(self, name: str, x: Tensor, weight: Weight) -> None:
        (n, k), plan = shape_of(weight), self._product_plan(name)
        _product[(triton.cdiv(n, plan.BN), self._splits[name])](
            x, weight, self._shares[name], self.rows, n, k, self._columns[name],
            BB=self._padded, BK=plan.BK, BN=plan.BN, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip

    def _normalise(self, norm: Tensor, bias: Tensor | None, splits: int) -> None:
        h = norm.shape[0]
        _norm[(self.rows,)](
            self._shares["out_proj"], bias, self._residual, norm, self._x, self.eps, self.rows,
            h, triton.next_power_of_2(h), splits, HAS_BIAS=bias is not None, num_warps=16 if h >= 2048 else 8,
        )  # fmt: skip

    def _product_plan(self, name: str) -> Product:
        plan = self._plans[name]
        assert isinstance(plan, Product)
        return plan

    def _tile(self, name: str) -> Tile:
        tile = self._plans[name]
        assert isinstance(tile, Tile)
        return tile
