"""One token for up to 128 rows of a model with packed weights: the kernels of `triton_many_rows.py`, but for the
products, which widen int8, int4 or fp8 weights in registers (`mambakit.ops.linear.triton_kernels`).

They leave partial sums as the others do, so convolution, scan and norm are the same. The head's are added by a kernel
of its own, which leaves each program's best token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.decode.triton_many_rows import ManyRowsStep, Product, Tile
from mambakit.ops.decode.triton_tokens import TokenBuffers
from mambakit.ops.decode.weights import ModelWeights, Weight, shape_of
from mambakit.ops.linear import triton_kernels, triton_plan
from mambakit.ops.linear.triton import ASM, KEPT, card_of

MOST_ROWS = 128
_LOGITS = 1024  # of a program of `logits_kernel`


def most_rows(width: int, kind: tuple[int, int]) -> int:
    """Rows up to which these kernels serve before the model's forward as a CUDA graph; ``kind`` as in `kind_of`.

    Measured on an H200, of 64 and 128 rows: at a width of 768 int8 is the faster one here (0.91 ms for 1.14 of 128
    rows), at 2,048 the forward is (int8 2.88 for 2.64, int4 2.88 for 2.56 of 64 rows; fp8 2.62 for 3.11 of 64 and 4.17
    for 3.72 of 128), since its products have kernels of their own for that many rows.
    """
    if width < 1536:
        return MOST_ROWS
    return 64 if kind[0] == 1 else 32


@triton.jit
def logits_kernel(
    parts, logits, best, best_token, rows, dtype: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """logits (rows, V) float32, rounded to the model's dtype, from the head's partial sums (SPLITS, rows, V); best,
    best_token (rows, BLOCKS): each program's largest logit and its first token."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + b) * V + n, mask=n < V, other=0.0)
    total = total.to(dtype).to(tl.float32)
    tl.store(logits + b * V + n, total, mask=n < V)
    candidates = tl.where(n < V, total, float("-inf"))
    largest = tl.max(candidates, axis=0)
    token = tl.min(tl.where(candidates == largest, n, V - 1), axis=0)
    place = b * BLOCKS + tl.program_id(1)
    tl.store(best + place, largest)
    tl.store(best_token + place, token)


class PackedRowsStep(ManyRowsStep):
    """``step()`` as `ManyRowsStep`'s, of int8, int4 or fp8 weights, all of one kind, in a model of a half dtype.

    Args:
        weights, conv_states, ssm_states, capacity, chosen, shared: as `ManyRowsStep`'s; ``chosen`` names "conv" and
            "scan" alone.
        tiles: replace the tiles of products, by name.

    Raises:
        ValueError: states that cannot be updated in place, too many rows, or weights that are not packed.
    """

    packed = True

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        chosen: dict[str, Product | Tile] | None = None,
        shared: int | None = None,
        tiles: dict[str, triton_plan.Product] | None = None,
    ):
        super().__init__(weights, conv_states, ssm_states, capacity, chosen, shared=shared)
        rows, dtype, device = self.rows, self._x.dtype, self._x.device
        if rows > MOST_ROWS:
            raise ValueError(f"PackedRowsStep: {rows} rows; it serves 1 to {MOST_ROWS}, split larger batches")
        processors, memory, _ = card_of(self._x)
        layer = self.layers[0]
        self._packed_tiles: dict[str, triton_plan.Product] = {}
        for name, weight in (
            ("in_proj", layer.in_proj), ("x_proj", layer.x_proj), ("out_proj", layer.out_proj), ("head", self.head),
        ):  # fmt: skip
            assert not isinstance(weight, Tensor)
            tile = (tiles or {}).get(name) or triton_plan.tile_of(weight.format, rows)
            n, k = shape_of(weight)
            tile = tile.fitting(weight.format, weight.group, dtype.itemsize, (shared or memory) - KEPT)
            tile = self._packed_tiles[name] = tile.spread(rows, n, k, processors)
            self._splits[name], self._columns[name] = tile.splits(rows, n, k, processors)
            self._parts[name] = torch.zeros(self._splits[name], rows, n, dtype=torch.float32, device=device)
        self._blocks = triton.cdiv(self.head.out_features, _LOGITS)  # type: ignore[union-attr]
        self._buffers = TokenBuffers(rows, self.logits.shape[1], self._blocks, capacity, device)
        self.tokens, self.position, self.history = self._buffers.tokens, self._buffers.position, self._buffers.history
        self.logits = self._buffers.logits

    def _multiply(self, name: str, x: Tensor, weight: Weight) -> None:
        assert not isinstance(weight, Tensor)
        (n, k), tile = shape_of(weight), self._packed_tiles[name]
        triton_kernels.product_kernel[(triton.cdiv(n, tile.BN) * triton.cdiv(self.rows, tile.BB), self._splits[name])](
            x, weight.data, weight.scales, None, self._parts[name], self.rows, k,
            n, k, self._columns[name], triton_plan.BITS[weight.format], weight.group, BN=tile.BN, BB=tile.BB,
            BK=tile.BK, STAGES=tile.stages, SPLITS=self._splits[name], AFTER=tile.after, ROWS_FIRST=tile.rows_first,
            ASM=ASM, HAS_BIAS=False, num_warps=tile.warps,
        )  # fmt: skip

    def _multiply_head(self) -> None:
        self._multiply("head", self._x, self.head)
        dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[self._x.dtype]
        logits_kernel[(self.rows, self._blocks)](
            self._parts["head"], self.logits, self._buffers.best, self._buffers.best_token, self.rows, dtype,
            self.logits.shape[1], self._blocks, self._splits["head"], SIZE=_LOGITS, num_warps=4,
        )  # fmt: skip
