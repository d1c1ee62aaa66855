"""Products of packed weights as items of a launch list: weights widened in registers or in memory, fp8 ones with rows
in float8. Contract: `triton.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mambakit.ops._backends.launch_list import HostItem, Item, Matrix, Place, Product
from mambakit.ops._backends.prepared_triton import PreparedTriton
from mambakit.ops.linear import triton as launches
from mambakit.ops.linear import triton_kernels as kernels
from mambakit.ops.linear.packed import FLOAT8, PackedWeight
from mambakit.ops.linear.triton_plan import Product as ProductPlan
from mambakit.ops.linear.triton_plan import slab_of, slabs

DATA = {"int8": torch.int8, "int4": torch.int16, "fp8": torch.uint8}  # of the packed numbers


class PreparedWidened:
    """out (+)= x weight^T, the weight (n, k) in x's dtype, a slab of it at a time.

    Attributes:
        count: elements of memory that a slab takes.
    """

    def __init__(self, rows: int, n: int, k: int, format: str, group: int, dtype: torch.dtype):
        self._k, self._dtype, self._parts = k, dtype, slabs(n, k, dtype.itemsize, slab_of(rows))
        self.count = self._parts[0][1] * k
        self._widen = []
        for first, count in self._parts:
            grid, options = launches.widening(count, n, k, format, group)
            arguments = {"data": DATA[format], "scales": torch.float32, "y": dtype, "first": first}
            self._widen.append(PreparedTriton(kernels.widen_kernel, grid, arguments, options))

    def items(
        self, x: Matrix, data: Place, scales: Place, memory: Matrix, out: Matrix, on_gpu: bool, accumulate: bool
    ) -> list[Item]:
        """``memory``: `count` elements from there on; ``accumulate``: onto what ``out`` holds."""
        items: list[Item] = []
        place = Place(memory.array, memory.start * self._dtype.itemsize)
        for (first, count), widen in zip(self._parts, self._widen, strict=True):
            slab = Matrix(memory.array, (count, self._k), (self._k, 1), memory.start)
            part = Matrix(out.array, (out.shape[0], count), out.strides, out.start + first)
            items.append(widen.item(data, scales, place))
            items.append(Product(x, slab.t, part, self._dtype, self._dtype, on_gpu, accumulate))
        return items


class ProductInRegisters(HostItem):
    """out = x weight^T + bias by Triton's own launches.

    Args:
        x: (rows, k); out: (rows, n), contiguous.
        data, scales, bias: the arrays of an int8, int4 or fp8 weight and of its bias, or None.
    """

    def __init__(
        self, x: Matrix, kind: tuple[str, int, int], data: int, scales: int, bias: int | None, out: Matrix,
        plan: ProductPlan,
    ):  # fmt: skip
        self._x, self._kind, self._data, self._scales, self._bias = x, kind, data, scales, bias
        self._out, self._plan = out, plan

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        data, bias = arrays[self._data], None if self._bias is None else arrays[self._bias]
        assert data is not None
        format, in_features, group = self._kind
        weight = PackedWeight(format, data, arrays[self._scales], in_features, group)
        launches.in_registers(self._x.of(arrays), weight, bias, self._plan, self._out.of(arrays))


class PreparedRows:
    """Rows (rows, k) in float8 and their scales."""

    def __init__(self, rows: int, k: int, dtype: torch.dtype):
        size = triton.next_power_of_2(k)
        arguments = {"x": dtype, "q": torch.uint8, "scales": torch.float32, "stride_x": k}
        options = {"K": k, "SIZE": size, "num_warps": launches.row_warps(size)}
        self._launch = PreparedTriton(kernels.float8_kernel, (rows,), arguments, options)

    def items(self, x: Place, q: Place, scales: Place) -> list[Item]:
        return [self._launch.item(x, q, scales)]


class PreparedNormedRows:
    """Addition to the residual stream, and the norm's rows (rows, h) in float8 and their scales; the norm is rounded to
    bfloat16 before."""

    def __init__(
        self, rows: int, h: int, eps: float, x: torch.dtype, weight: torch.dtype, residual: torch.dtype | None,
        kept: torch.dtype,
    ):  # fmt: skip
        size = triton.next_power_of_2(h)
        self._has_residual = residual is not None
        self._launch = PreparedTriton(
            kernels.norm_float8_kernel,
            (rows,),
            {
                "x": x, "weight": weight, "residual": residual, "kept": kept, "q": torch.uint8, "scales": torch.float32,
                "stride_x": h, "stride_r": h if self._has_residual else 0, "eps": eps,
            },
            {
                "H": h, "SIZE": size, "HAS_RESIDUAL": self._has_residual, "ROUNDED": 1,
                "num_warps": launches.row_warps(size),
            },
        )  # fmt: skip

    def items(self, x: Place, weight: Place, residual: Place, kept: Place, q: Place, scales: Place) -> list[Item]:
        """``residual`` is not read where there is none."""
        given = (residual,) if self._has_residual else ()
        return [self._launch.item(x, weight, *given, kept, q, scales)]


class Float8Product(HostItem):
    """out (rows, n) bfloat16 = (q scales) weight^T, by PyTorch's product of float8.

    Args:
        q, scales: float8 (rows, k) and float32 (rows,), in an array of any dtype.
        data, weight_scales: the arrays of an fp8 weight's bits (n, k) and of its rows' scales (n, 1).
    """

    def __init__(self, q: Place, scales: Place, rows: int, k: int, data: int, weight_scales: int, out: Matrix):
        self._q, self._scales, self._rows, self._k = q, scales, rows, k
        self._data, self._weight_scales, self._out = data, weight_scales, out

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        q = _within(arrays, self._q, FLOAT8, self._rows * self._k).view(self._rows, self._k)
        scales = _within(arrays, self._scales, torch.float32, self._rows).view(self._rows, 1)
        data, weight_scales = arrays[self._data], arrays[self._weight_scales]
        assert data is not None
        assert weight_scales is not None
        launches.scaled_into(self._out.of(arrays), q, scales, data, weight_scales)


def _within(arrays: Sequence[Tensor | None], place: Place, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` elements of ``dtype`` at a place."""
    array = arrays[place.array]
    assert array is not None
    return array.view(dtype).narrow(0, place.offset // dtype.itemsize, count)
