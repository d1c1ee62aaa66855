"""The convolution's Triton kernels as items of a launch list, for whole rows of one shape and one set of strides.

SiLU is on. Each class has the arguments of `triton.py`'s launches, without packing; the state starts from zeros, or is
a pool that is updated in place.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.ops._backends.launch_list import Item, Place
from mambakit.ops._backends.prepared_triton import PreparedTriton
from mambakit.ops.causal_conv1d import triton as launches
from mambakit.ops.causal_conv1d import triton_kernels as kernels

_FLOAT32 = torch.float32


def serves(x: Tensor, k: int) -> bool:
    """Whether the kernels run a filter of this width on this dtype."""
    return launches._on_kernels(x, k)


class PreparedForward:
    """`forward_kernel`, from zeros: x, weight, bias (where there is one), y, final."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None):
        b, length, d = x.shape
        k = weight.shape[1]
        tile = launches.forward_tile(x, k, restarts=False)
        chunks = triton.cdiv(length, tile.steps)
        programs = triton.cdiv(b * chunks, tile.rows)
        self._launch = PreparedTriton(
            kernels.forward_kernel,
            ((programs + b) * triton.cdiv(d, tile.block_d),),
            {
                "x": x.dtype, "weight": weight.dtype, "bias": None if bias is None else bias.dtype, "initial": None,
                "slots": None, "starts": None, "ids": None, "cu_seqlens": None, "y": x.dtype, "final": x.dtype,
                "length": length, "channels": d, "chunks": chunks, "walks": b * chunks, "programs": programs,
                "stride_xb": x.stride(0) if b > 1 else 0, "stride_xt": x.stride(1) if length > 1 else 0,
                "stride_wd": weight.stride(0), "stride_wk": weight.stride(1),
                "stride_s": 0, "stride_d": 0, "stride_k": 0,
            },
            {
                "K": k, "ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": tile.block_d, "UNROLL": tile.unroll,
                "KP": triton.next_power_of_2(k - 1), "SILU": True, "HAS_BIAS": bias is not None,
                "HAS_INITIAL": False, "HAS_SLOTS": False, "PACKED": False, "num_warps": tile.num_warps,
            },
        )  # fmt: skip
        self._has_bias = bias is not None
        self.final_count = b * d * (k - 1)

    def items(self, x: Place, weight: Place, bias: Place, y: Place, final: Place) -> list[Item]:
        """``bias`` is not read where there is none."""
        given = (weight, bias) if self._has_bias else (weight,)
        return [self._launch.item(x, *given, y, final)]


class PreparedInPlace:
    """`forward_` on a pool of contiguous states (slots, d, k - 1), of which row i has slot i.

    Args:
        x: (b, l, d) of the layout that later calls have. state: the pool's dtype.

    Attributes:
        final_count: elements of the pool's dtype of scratch memory that a call needs.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: torch.dtype):
        b, length, d = x.shape
        k = weight.shape[1]
        self._has_bias, bias_dtype = bias is not None, None if bias is None else bias.dtype
        strides = {"stride_s": d * (k - 1), "stride_d": k - 1, "stride_k": 1}
        inputs = {
            "stride_xb": x.stride(0) if b > 1 else 0, "stride_xt": x.stride(1) if length > 1 else 0,
            "stride_wd": weight.stride(0), "stride_wk": weight.stride(1),
        }  # fmt: skip
        flags = {"SILU": True, "HAS_BIAS": self._has_bias, "HAS_SLOTS": False, "PACKED": False}
        self._scatter, self.final_count = None, 0
        if length <= launches._DECODE_STEPS:
            self._launch = PreparedTriton(
                kernels.decode_kernel,
                (b * triton.cdiv(d, 128),),
                {
                    "state": state, "slots": None, "x": x.dtype, "weight": weight.dtype, "bias": bias_dtype,
                    "cu_seqlens": None, "y": x.dtype, "length": length, "channels": d, **inputs, **strides,
                },
                {"K": k, "BLOCK_D": 128, "UNROLL": 1 if length == 1 else 4, **flags, "num_warps": 1},
            )  # fmt: skip
            return
        tile = launches.forward_tile(x, k, restarts=False)
        chunks = triton.cdiv(length, tile.steps)
        programs = triton.cdiv(b * chunks, tile.rows)
        self._launch = PreparedTriton(
            kernels.forward_kernel,
            ((programs + b) * triton.cdiv(d, tile.block_d),),
            {
                "x": x.dtype, "weight": weight.dtype, "bias": bias_dtype, "initial": state, "slots": None,
                "starts": None, "ids": None, "cu_seqlens": None, "y": x.dtype, "final": state, "length": length,
                "channels": d, "chunks": chunks, "walks": b * chunks, "programs": programs, **inputs, **strides,
            },
            {
                "K": k, "ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": tile.block_d, "UNROLL": tile.unroll,
                "KP": triton.next_power_of_2(k - 1), "HAS_INITIAL": True, **flags, "num_warps": tile.num_warps,
            },
        )  # fmt: skip
        # Two walks may read one state, so it is written only after all of them, from a copy.
        self._scatter = PreparedTriton(
            kernels.scatter_kernel,
            (b, triton.cdiv(d * (k - 1), 1024)),
            {"final": state, "state": state, "slots": None, "channels": d, **strides},
            {"K": k, "BLOCK": 1024, "HAS_SLOTS": False},
        )
        self.final_count = b * d * (k - 1)

    def items(self, x: Place, weight: Place, bias: Place, y: Place, state: Place, scratch: Place) -> list[Item]:
        given = (weight, bias) if self._has_bias else (weight,)
        if self._scatter is None:
            return [self._launch.item(state, x, *given, y)]
        return [self._launch.item(x, *given, state, y, scratch), self._scatter.item(scratch, state)]


class PreparedBackward:
    """`backward_kernel` and `sum_partials_kernel`, from zeros and without a gradient of the final state.

    Args:
        x, dx: (b, l, d), of the layout that later calls have; dy is contiguous.

    Attributes:
        partial_count: float32 elements of scratch memory that a call needs.
    """

    def __init__(self, x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor | None):
        b, length, d = x.shape
        k = weight.shape[1]
        tile = launches.backward_tile(x, k, restarts=False)
        chunks = triton.cdiv(length, tile.steps)
        programs = triton.cdiv(b * chunks, tile.rows)
        bias_dtype = None if bias is None else bias.dtype
        along = (b > 1, length > 1)
        (yb, yt), (xb, xt) = ((s * a for s, a in zip(strides, along, strict=True))
                              for strides in ((length * d, d), x.stride()[:2]))  # fmt: skip
        self._backward = PreparedTriton(
            kernels.backward_kernel,
            (programs * triton.cdiv(d, tile.block_d),),
            {
                "dy": x.dtype, "dfinal": None, "x": x.dtype, "weight": weight.dtype, "bias": bias_dtype,
                "initial": None, "starts": None, "ids": None, "cu_seqlens": None, "dx": x.dtype,
                "partials": _FLOAT32, "dinitial": x.dtype, "length": length, "channels": d, "chunks": chunks,
                "walks": b * chunks, "programs": programs, "stride_yb": yb, "stride_yt": yt, "stride_xb": xb,
                "stride_xt": xt, "stride_db": dx.stride(0), "stride_dt": dx.stride(1), "stride_wd": weight.stride(0),
                "stride_wk": weight.stride(1), "stride_s": 0, "stride_d": 0, "stride_k": 0,
            },
            {
                "K": k, "ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": tile.block_d, "UNROLL": tile.unroll,
                "SILU": True, "HAS_BIAS": bias is not None, "HAS_INITIAL": False, "HAS_DFINAL": False,
                "PACKED": False, "num_warps": tile.num_warps,
            },
        )  # fmt: skip
        self._sum = PreparedTriton(
            kernels.sum_partials_kernel,
            (triton.cdiv(d, 32), k + (bias is not None)),
            {
                "partials": _FLOAT32, "dweight": weight.dtype, "dbias": bias_dtype, "count": programs, "channels": d,
            },
            {"K": k, "HAS_BIAS": bias is not None, "ROWS": 128, "BLOCK_D": 32},
        )  # fmt: skip
        self._has_bias = bias is not None
        self.partial_count = programs * (k + 1) * d

    def items(
        self, dy: Place, x: Place, weight: Place, bias: Place, dx: Place, dweight: Place, dbias: Place, scratch: Place
    ) -> list[Item]:  # fmt: skip
        # The last address is that of the state's gradient, which is not written.
        given, wanted = ((weight, bias), (dweight, dbias)) if self._has_bias else ((weight,), (dweight,))
        backward = self._backward.item(dy, x, *given, dx, scratch, scratch)
        return [backward, self._sum.item(scratch, *wanted)]
