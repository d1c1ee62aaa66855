"""One token for up to 512 rows through a whole Mamba model, in Triton: six kernels a layer, products on the tensor
cores.

`product_kernel` multiplies all rows by a weight and leaves float32 partial sums of a split-K product, which its
consumers add in a fixed order: `conv_kernel` convolves in_proj's x and shifts the window, `scan_kernel` takes dt, B and
C from x_proj's, normalises them where the model does, computes the step sizes (dt_proj), updates the state and applies
the gate, `norm_kernel` adds out_proj's to the residual stream and normalises it. `head_kernel` leaves each program's
best token. Activations are rounded to the weights' dtype where the model's forward rounds them; sums and the residual
stream are float32. How products are tiled does not depend on what the rows hold, so a row's bits do not depend on the
other rows as long as their number stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from mambakit.ops._sums import ALIKE
from mambakit.ops.decode import triton_many_rows_kernels as kernels
from mambakit.ops.decode.triton_tokens import TokenBuffers
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, Weight, check_states, shape_of

MOST_ROWS = 512
_BLOCK = 128  # rows of a product's tile


def most_rows(width: int, dtype: torch.dtype) -> int:
    """Rows up to which these kernels serve before the model's forward as a CUDA graph.

    Measured in bfloat16 on an H200. At a width of 768 the two are level at 256 and 512 rows (1.17 and 1.73 ms). At
    2,048 they are level at 128, and beyond the forward is the faster one (4.53 for 5.32 ms of 256 rows). float32 was
    not measured; it has no tensor cores here.
    """
    if dtype == torch.float32:
        return 32 if width < 2560 else 16
    return MOST_ROWS if width < 1536 else 128 if width < 2560 else 64


@dataclass(frozen=True)
class Product:
    """A split-K product's tile: BN rows and BK columns of the weight, and how a program loads it."""

    BN: int
    BK: int
    warps: int
    stages: int  # of the software pipeline
    splits: int = 1  # programs that share the columns

    def within(self, rows: int, itemsize: int, limit: int) -> Product:
        """With fewer stages, or fewer columns, until the stages fit ``limit`` bytes of shared memory."""
        plan = self
        # Triton allocates one tile less than stages, but as many for Hopper's wgmma.
        while plan.stages * (plan.BN + rows) * plan.BK * itemsize > limit and (plan.stages, plan.BK) != (2, 16):
            stages, columns = (plan.stages - 1, plan.BK) if plan.stages > 2 else (plan.stages, plan.BK // 2)
            plan = replace(plan, stages=stages, BK=columns)
        return plan


@dataclass(frozen=True)
class Tile:
    """A program's tile of the convolution or the scan."""

    channels: int
    rows: int
    warps: int


def plans(rows: int, state_size: int) -> dict[str, Product | Tile]:
    """By kernel; measured on an H100 with the layers of the 1.4b model."""
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
    if rows > _BLOCK:  # several blocks of rows: fewer splits fill the card, and leave fewer partial sums
        splits = 2 if rows <= 256 else 1
        products = {
            "in_proj": Product(128, 64, 8, 4),
            "out_proj": Product(128, 64, 8, 4, splits),
            "head": Product(128, 64, 8, 4),
            "x_proj": Product(32, 64, 4, 5, 2 * splits),
        }
    scan = Tile(16, 4, 4 if rows <= 8 else 2) if rows <= 16 else Tile(64, 4, 4)
    while scan.channels * scan.rows * state_size > 8192:  # a program's registers
        scan = replace(scan, rows=scan.rows // 2) if scan.rows > 1 else replace(scan, channels=scan.channels // 2)
    conv = Tile(64, 1 if rows <= 16 else 2, 4) if rows <= 32 else Tile(128, 1, 2)
    return products | {"conv": conv, "scan": scan}


class ManyRowsStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    The step has buffers of its own, so that a CUDA graph can capture the call. With ``choose`` the most probable token
    of each row becomes the next step's token, and step i (``position`` counts them) writes it to ``history[:, i]``.

    Args:
        weights: the model's, read in place at every step; all of one floating dtype.
        conv_states, ssm_states: (layers, rows, d, k - 1) and (layers, rows, d, n) float32, or bfloat16, to which
            they are rounded after each token; contiguous.
        capacity: of ``history``.
        chosen: replace plans of `plans`, by name.
        draft: tokens of each row of the states: the rows are so many times theirs (`triton_verify` alone).
        shared: bytes of shared memory that a program may have; None: the device's.

    Raises:
        ValueError: states that cannot be updated in place, too many rows, or packed weights.
    """

    packed = False  # whether it reads packed weights (`triton_packed_rows`)

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        chosen: dict[str, Product | Tile] | None = None,
        draft: int = 1,
        shared: int | None = None,
    ):
        rows, n = ssm_states.shape[1] * draft, ssm_states.shape[3]
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"ManyRowsStep: {rows} rows; it serves 1 to {MOST_ROWS}, split larger batches")
        check_states(conv_states, ssm_states, (torch.float32, torch.bfloat16))
        if (weights.kind is not None) != self.packed:
            raise ValueError(
                "ManyRowsStep reads floating weights, and these are packed; PackedRowsStep serves them"
                if not self.packed
                else "PackedRowsStep reads packed weights, and these are floating ones; ManyRowsStep serves them"
            )
        self.layers, self.embeddings, self.final_norm = weights.layers, weights.embeddings, weights.final_norm
        self.head, self.eps = weights.head, weights.eps
        self._norms, self._mixer_eps = weights.norms, weights.mixer_eps or 0.0
        self.conv_states, self.ssm_states, self.rows = conv_states, ssm_states, rows
        device, dtype = self.embeddings.device, self.layers[0].dt_proj.dtype
        (v, h), (r, d) = shape_of(self.head), shape_of(self.layers[0].x_proj)
        self._block = min(_BLOCK, max(16, triton.next_power_of_2(rows)))  # rows of a product's tile
        self._row_blocks = triton.cdiv(rows, self._block)
        padded = self._row_blocks * self._block  # a product reads whole tiles of rows
        self._plans = plans(rows, n) | (chosen or {})
        if shared is None and device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
        if shared is not None:
            for name, plan in self._plans.items():
                if isinstance(plan, Product):
                    self._plans[name] = plan.within(self._block, dtype.itemsize, shared - 4096)
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

        self._buffers = TokenBuffers(rows, v, self._blocks, capacity, device)
        self.tokens, self.position, self.history = self._buffers.tokens, self._buffers.position, self._buffers.history
        self.logits = self._buffers.logits
        self._residual = buffer(rows, h)
        self._parts = {
            name: buffer(self._splits[name], rows, width)
            for name, width in (("in_proj", 2 * d), ("x_proj", r), ("out_proj", h))
        }
        self._x = buffer(padded, h, dtype=dtype)
        self._u, self._y = (buffer(padded, d, dtype=dtype) for _ in range(2))

    def __call__(self, choose: bool = False) -> Tensor:
        self._buffers.embed(self.embeddings, self._residual)
        self._normalise(self.layers[0].norm, None, 0)
        norms = [w.norm for w in self.layers[1:]] + [self.final_norm]
        for i, (w, norm) in enumerate(zip(self.layers, norms, strict=True)):
            self._multiply("in_proj", self._x, w.in_proj)
            self._recur(i, w)
            self._multiply("out_proj", self._y, w.out_proj)
            self._normalise(norm, w.out_proj_bias, self._splits["out_proj"])
        self._multiply_head()
        if choose:
            self._buffers.choose()
        return self.logits

    def _multiply_head(self) -> None:
        (v, h), plan = shape_of(self.head), self._product_plan("head")
        kernels.head_kernel[(self._row_blocks, self._blocks)](
            self._x, self.head, self.logits, self._buffers.best, self._buffers.best_token, self.rows, h, v,
            self._blocks,
            BB=self._block, BK=plan.BK, BN=plan.BN, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip

    def _recur(self, i: int, w: LayerWeights) -> None:
        """y of layer ``i`` from in_proj's partial sums: convolution, x_proj and scan."""
        conv_state, state = self.conv_states[i], self.ssm_states[i]
        rows, (r, d) = self.rows, shape_of(w.x_proj)
        width, n, rank = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1]
        bias = w.in_proj_bias
        tile = self._tile("conv")
        kernels.conv_kernel[(triton.cdiv(d, tile.channels), triton.cdiv(rows, tile.rows))](
            self._parts["in_proj"], bias, conv_state, w.conv, w.conv_bias, self._u, rows,
            d, width, triton.next_power_of_2(width), self._splits["in_proj"], BD=tile.channels, ROWS=tile.rows,
            HAS_BIAS=bias is not None, HAS_CONV_BIAS=w.conv_bias is not None, num_warps=tile.warps, **ALIKE,
        )  # fmt: skip
        self._multiply("x_proj", self._u, w.x_proj)
        tile = self._tile("scan")
        kernels.scan_kernel[(triton.cdiv(d, tile.channels), triton.cdiv(rows, tile.rows))](
            self._parts["x_proj"], self._parts["in_proj"], bias, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, state,
            self._y, *w.norms(), self._mixer_eps,
            rows, r, d, rank, n, self._splits["x_proj"], self._splits["in_proj"], BD=tile.channels,
            BR=max(16, triton.next_power_of_2(rank)), BS=triton.next_power_of_2(n), ROWS=tile.rows,
            HAS_BIAS=bias is not None, NORMS=self._norms,
            num_warps=tile.warps, **ALIKE,
        )  # fmt: skip

    def _multiply(self, name: str, x: Tensor, weight: Weight) -> None:
        (n, k), plan = shape_of(weight), self._product_plan(name)
        kernels.product_kernel[(self._row_blocks, triton.cdiv(n, plan.BN), self._splits[name])](
            x, weight, self._parts[name], self.rows, n, k, self._columns[name],
            BB=self._block, BK=plan.BK, BN=plan.BN, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip

    def _normalise(self, norm: Tensor, bias: Tensor | None, splits: int) -> None:
        h = norm.shape[0]
        kernels.norm_kernel[(self.rows,)](
            self._parts["out_proj"], bias, self._residual, norm, self._x, self.eps, self.rows,
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
