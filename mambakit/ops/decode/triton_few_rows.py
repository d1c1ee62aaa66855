"""One token for up to 4 rows through a whole Mamba model, in Triton: four kernels a layer, made to be captured in a
CUDA graph.

It serves what the persistent kernel does not (float32, other state sizes). A step is bound by reading the weights, and
memory idles between kernels: so each kernel is fused with its neighbours' small work. `in_proj_kernel` normalises the
residual stream as it reads it, convolves, and shifts the window; `scan_kernel` normalises dt, B and C where the model
does, computes the step sizes (dt_proj), updates the state and applies the gate; `out_proj_kernel` adds to the residual
stream; `head_kernel` leaves each program's best token for `triton_tokens.py` to choose from. Activations are rounded to
the weights' dtype where the model's forward rounds them; sums and the residual stream are float32.

A row's bits do not depend on the other rows as long as the number of rows that the step was made for is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mambakit.ops._sums import ALIKE
from mambakit.ops.decode import triton_few_rows_kernels as kernels
from mambakit.ops.decode.triton_tokens import TokenBuffers
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, check_states, shape_of, tensors_of

MOST_ROWS = 4


@dataclass(frozen=True)
class Tile:
    """A product's tile: BN rows and BK columns of the weight, and how a program loads it."""

    BN: int
    BK: int
    warps: int
    stages: int  # of the software pipeline


def _tiles(rows: int, h: int) -> dict[str, Tile]:
    """Measured on an H100: enough programs to keep memory busy."""
    columns, wide = 256, h >= 1536
    return {
        "in_proj": Tile(8, columns, 2 if rows == 1 else 4, 3),
        "x_proj": Tile(1, columns, 8, 3),
        "out_proj": Tile(8, columns, 4, 3) if wide else Tile(2, 2 * columns, 4, 3),
        "head": Tile(16 if wide else 8, columns, 4, 3),
    }


class FewRowsStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    The step has buffers of its own, so that a CUDA graph can capture the call. With ``choose`` the most probable token
    of each row becomes the next step's token, and step i (``position`` counts them) writes it to ``history[:, i]``.

    Args:
        weights: the model's, read in place at every step.
        conv_states, ssm_states: (layers, rows, d, k - 1) and (layers, rows, d, n) float32, contiguous.
        capacity: of ``history``.
        tiles: replace the tiles of the products named ("in_proj", "x_proj", "out_proj", "head").

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
        self._kind, self._norms, self._mixer_eps = weights.kind, weights.norms, weights.mixer_eps or 0.0
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

        self._buffers = TokenBuffers(rows, v, self._blocks, capacity, device)
        self.tokens, self.position, self.history = self._buffers.tokens, self._buffers.position, self._buffers.history
        self.logits = self._buffers.logits
        self._residual, self._sums = buffer(rows, h), buffer(rows, r)
        self._u, self._z, self._y = (buffer(rows, d, dtype=dtype) for _ in range(3))

    def __call__(self, choose: bool = False) -> Tensor:
        h = self.final_norm.shape[0]
        rows = self.rows
        self._buffers.embed(self.embeddings, self._residual)
        for i, w in enumerate(self.layers):
            self._layer(w, self.conv_states[i], self.ssm_states[i])
        tile = self.tiles["head"]
        v = self.logits.shape[1]
        kernels.head_kernel[(self._blocks,)](
            self._residual, self.final_norm, *tensors_of(self.head), self.logits, self._buffers.best,
            self._buffers.best_token, self.eps, rows,
            h, v, self._blocks, **self._constants(tile),
        )  # fmt: skip
        if choose:
            self._buffers.choose()
        return self.logits

    def _constants(self, tile: Tile) -> dict[str, int | bool]:
        """A product's compile-time constants."""
        return {
            "BB": self._bb, "BK": max(64, tile.BK) if self._kind else tile.BK, "BN": tile.BN,
            "STAGES": tile.stages, "BITS": self._kind[0] if self._kind else 0,
            "GROUP": self._kind[1] if self._kind else 0,
            "num_warps": tile.warps,
        }  # fmt: skip

    def _layer(self, w: LayerWeights, conv_state: Tensor, state: Tensor) -> None:
        rows, h, (r, d) = self.rows, self.final_norm.shape[0], shape_of(w.x_proj)
        width, n, rank = w.conv.shape[1], state.shape[2], w.dt_proj.shape[1]
        tile = self.tiles["in_proj"]
        kernels.in_proj_kernel[(triton.cdiv(2 * d, tile.BN),)](
            self._residual, w.norm, *tensors_of(w.in_proj), w.in_proj_bias, conv_state, w.conv, w.conv_bias, self._u,
            self._z,
            self.eps, rows, h, d, width, HAS_BIAS=w.in_proj_bias is not None, HAS_CONV_BIAS=w.conv_bias is not None,
            **self._constants(tile),
        )  # fmt: skip
        tile = self.tiles["x_proj"]
        kernels.x_proj_kernel[(triton.cdiv(r, tile.BN),)](
            self._u, *tensors_of(w.x_proj), self._sums, rows, r, d, **self._constants(tile)
        )  # fmt: skip
        channels = 16
        kernels.scan_kernel[(triton.cdiv(d, channels), rows)](
            self._sums, w.dt_proj, w.dt_bias, w.A_log, w.D, self._u, self._z, state, self._y, *w.norms(),
            self._mixer_eps, rows,
            r, d, rank, n, BD=channels, BR=triton.next_power_of_2(rank), BS=triton.next_power_of_2(n),
            NORMS=self._norms, num_warps=2, **ALIKE,
        )  # fmt: skip
        tile = self.tiles["out_proj"]
        kernels.out_proj_kernel[(triton.cdiv(h, tile.BN),)](
            self._y, *tensors_of(w.out_proj), w.out_proj_bias, self._residual, rows, h, d,
            HAS_BIAS=w.out_proj_bias is not None, **self._constants(tile),
        )  # fmt: skip
