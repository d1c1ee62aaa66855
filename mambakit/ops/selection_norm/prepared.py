"""The Triton kernels as items of a launch list, for contiguous rows of one size. Contract: `api.py`."""

from __future__ import annotations

import torch
import triton

from mambakit.ops._backends.launch_list import Item, Place
from mambakit.ops._backends.prepared_triton import PreparedTriton
from mambakit.ops.selection_norm import triton as launches

Kinds = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]


class PreparedForward:
    """The norms of x (rows, r + 2 n).

    Args:
        weights: dtypes of the three weights, or Nones.
    """

    def __init__(self, rows: int, rank: int, n: int, eps: float, dtype: torch.dtype, weights: Kinds):
        each = launches.sizes(rank, n)
        self._weighted = weights[0] is not None
        self._launch = PreparedTriton(
            launches._forward_kernel,
            (triton.cdiv(rows, each["ROWS"]),),
            {
                "x": dtype, "dt_weight": weights[0], "B_weight": weights[1], "C_weight": weights[2], "y": dtype,
                "rows": rows, "eps": eps,
            },
            {**each, "HAS_WEIGHT": self._weighted},
        )  # fmt: skip

    def items(self, x: Place, weights: tuple[Place, ...], y: Place) -> list[Item]:
        """``weights`` are not read where there are none."""
        return [self._launch.item(x, *(weights if self._weighted else ()), y)]


class PreparedBackward:
    """The gradient.

    Attributes:
        partial_count: float32 elements of scratch memory that a call needs.
    """

    def __init__(
        self, rows: int, rank: int, n: int, eps: float, device: torch.device, dtype: torch.dtype, weights: Kinds
    ):
        each = launches.sizes(rank, n)
        programs, runs = launches.cut(rows, each, device)
        self._weighted = weights[0] is not None
        self._backward = PreparedTriton(
            launches._backward_kernel,
            (programs,),
            {
                "dy": dtype, "x": dtype, "dt_weight": weights[0], "B_weight": weights[1], "C_weight": weights[2],
                "dx": dtype, "partials": torch.float32, "rows": rows, "runs": runs, "eps": eps,
            },
            {**each, "HAS_WEIGHT": self._weighted},
        )  # fmt: skip
        self.partial_count = programs * (rank + 2 * n) if self._weighted else 0
        if self._weighted:
            self._sum = PreparedTriton(
                launches._sum_partials_kernel,
                (triton.cdiv(rank + 2 * n, launches.SUM["BLOCK"]),),
                {
                    "partials": torch.float32, "ddt_weight": weights[0], "dB_weight": weights[1],
                    "dC_weight": weights[2], "count": programs,
                },
                {"R": rank, "N": n, **launches.SUM},
            )  # fmt: skip

    def items(
        self, dy: Place, x: Place, weights: tuple[Place, ...], dx: Place, dweights: tuple[Place, ...], scratch: Place
    ) -> list[Item]:
        """``weights`` are not read and ``dweights`` not written where there are none."""
        found: list[Item] = [self._backward.item(dy, x, *(weights if self._weighted else ()), dx, scratch)]
        return [*found, self._sum.item(scratch, *dweights)] if self._weighted else found
