"""The norm's Triton kernels as items of a launch list, for contiguous rows of one size. Contract: `api.py`."""

from __future__ import annotations

import torch
import triton

from mambakit.ops._backends.launch_list import Item, Place
from mambakit.ops._backends.prepared_triton import PreparedTriton
from mambakit.ops.rms_norm import triton as launches


class PreparedForward:
    """Addition to the residual stream, and the norm: x, weight, residual (where there is one), y, kept."""

    def __init__(
        self, rows: int, h: int, eps: float, x: torch.dtype, weight: torch.dtype, residual: torch.dtype | None,
        kept: torch.dtype, y: torch.dtype,
    ):  # fmt: skip
        count, block, num_warps = launches._block(h)
        stride = h if rows > 1 else 0
        self._launch = PreparedTriton(
            launches._forward_kernel,
            (triton.cdiv(rows, count),),
            {
                "x": x, "weight": weight, "residual": residual, "y": y, "kept": kept, "rows": rows, "h": h,
                "stride_x": stride, "stride_r": 0 if residual is None else stride, "eps": eps,
            },
            {
                "ROWS": count, "BLOCK_H": block, "HAS_WEIGHT": True, "HAS_RESIDUAL": residual is not None,
                "num_warps": num_warps,
            },
        )  # fmt: skip
        self._has_residual = residual is not None

    def items(self, x: Place, weight: Place, residual: Place, y: Place, kept: Place) -> list[Item]:
        """``residual`` is not read where there is none."""
        given = (weight, residual) if self._has_residual else (weight,)
        return [self._launch.item(x, *given, y, kept)]


class PreparedBackward:
    """The gradient: dy, dkept (where there is one), kept, weight, dx, dresidual (where there is one), dweight.

    Attributes:
        partial_count: float32 elements of scratch memory that a call needs.
    """

    def __init__(
        self, rows: int, h: int, eps: float, device: torch.device, dy: torch.dtype, weight: torch.dtype,
        kept: torch.dtype, dx: torch.dtype, has_dkept: bool, has_residual: bool,
    ):  # fmt: skip
        count, block, num_warps = launches._block(h)
        groups = triton.cdiv(rows, count)
        runs = triton.cdiv(groups, launches._programs(device, num_warps))
        programs = triton.cdiv(groups, runs)
        stride = h if rows > 1 else 0
        self._backward = PreparedTriton(
            launches._backward_kernel,
            (programs,),
            {
                "dy": dy, "dkept": kept if has_dkept else None, "kept": kept, "weight": weight, "dx": dx,
                # The kernel takes the address, and does not write where there is no residual.
                "dresidual": kept, "partials": torch.float32, "rows": rows, "h": h, "runs": runs, "stride_y": stride,
                "stride_k": stride if has_dkept else 0, "eps": eps,
            },
            {
                "ROWS": count, "BLOCK_H": block, "HAS_WEIGHT": True, "HAS_DKEPT": has_dkept,
                "HAS_RESIDUAL": has_residual, "num_warps": num_warps,
            },
        )  # fmt: skip
        self._sum = PreparedTriton(
            launches._sum_partials_kernel,
            (triton.cdiv(h, 16),),
            {"partials": torch.float32, "dweight": weight, "count": programs, "h": h},
            {"ROWS": 512, "BLOCK_H": 16, "num_warps": 8},
        )
        self._has_dkept = has_dkept
        self.partial_count = programs * h

    def items(
        self, dy: Place, dkept: Place, kept: Place, weight: Place, dx: Place, dresidual: Place, dweight: Place,
        scratch: Place,
    ) -> list[Item]:  # fmt: skip
        """``dkept`` is not read and ``dresidual`` not written where there is none."""
        given = (dy, dkept) if self._has_dkept else (dy,)
        backward = self._backward.item(*given, kept, weight, dx, dresidual, scratch)
        return [backward, self._sum.item(scratch, dweight)]
