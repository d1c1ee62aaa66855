"""`mambakit::linear` and its relatives on a GPU: packed weights at every number of rows. `triton_plan.py` chooses.

Weights are widened to x's dtype: in registers for few rows, in memory for many. fp8 weights meet many rows in float8:
each row of x is rounded to e4m3 with a scale of its own, found in the norm before it where there is one
(`normed_linear`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambakit.ops._autocast import no_autocast
from mambakit.ops.linear import chunked, hopper_kernels, triton_plan
from mambakit.ops.linear import triton_kernels as kernels
from mambakit.ops.linear.packed import FLOAT8, PackedWeight
from mambakit.ops.linear.schema import packed_of
from mambakit.ops.linear.triton_plan import BITS, Product
from mambakit.ops.rms_norm.triton import forward as rms_norm

_HALF = (torch.bfloat16, torch.float16)
KEPT = 4096  # bytes of shared memory that Triton takes beside the pipeline's stages
# For tensors on a CPU, interpreted, or compiled for a card that is not here: an H100's multiprocessors, shared memory.
WITHOUT_CARD = (132, 227 * 1024, (9, 0))
ASM = isinstance(kernels.product_kernel, triton.runtime.jit.JITFunction)  # the interpreter has no assembly


@functools.cache
def card(index: int) -> tuple[int, int, tuple[int, int]]:
    """(multiprocessors, bytes of shared memory of a CTA, compute capability)."""
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    return found["multiprocessor_count"], found["max_shared_mem"], torch.cuda.get_device_capability(index)


def card_at(device: torch.device) -> tuple[int, int, tuple[int, int]]:
    return card(device.index) if device.type == "cuda" else WITHOUT_CARD


def card_of(x: Tensor) -> tuple[int, int, tuple[int, int]]:
    return card_at(x.device)


def linear(x, data, scales, starts, columns, values, bias, format, in_features, group):
    """`mambakit::linear`."""
    weight = packed_of(data, scales, starts, columns, values, format, in_features, group)
    require_float8(x, weight)
    if x.dtype not in (*_HALF, torch.float32) or not x.numel() or not data.numel():
        return chunked.linear(x, weight, bias)
    with torch.cuda.device_of(x), no_autocast(x.device):
        flat = x.reshape(-1, in_features)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        y = _multiply(flat, weight, None if bias is None else bias.contiguous())
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


def tile_of_call(
    device: torch.device, dtype: torch.dtype, rows: int, out_features: int, format: str, in_features: int, group: int,
    row_bytes: int,
) -> Product | None:  # fmt: skip
    """The tile of a product that widens in registers, of data that begins at a multiple of 16 bytes; None: another way
    serves."""
    _, shared, capability = card_at(device)
    hopper = ASM and triton_plan.takes_hopper(capability, dtype, format, row_bytes, in_features)
    widened = out_features * in_features * dtype.itemsize
    return triton_plan.product_of(format, dtype, group, rows, shared - KEPT, hopper, widened)


def _multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x (rows, in) with adjacent columns."""
    rows, n = x.shape[0], weight.out_features
    if weight.format in BITS:
        hopper, shared = takes_hopper(x, weight), card_of(x)[1] - KEPT
        widened_bytes = n * weight.in_features * x.dtype.itemsize
        plan = triton_plan.product_of(weight.format, x.dtype, weight.group, rows, shared, hopper, widened_bytes)
        if plan is not None:
            return in_registers(x, weight, bias, plan)
        if weight.format == "fp8" and triton_plan.takes_float8(x.dtype, rows, n, weight.in_features):
            return scaled(*rows_in_float8(x), weight, bias, x.dtype)
    return widened(x, weight, bias, triton_plan.slab_of(rows))


def require_float8(x: Tensor, weight: PackedWeight) -> None:
    """ValueError where the weight is fp8 and the card has no 8-bit floats: it would be slower than plain weights."""
    if weight.format != "fp8":
        return
    capability = card_of(x)[2]
    if capability < triton_plan.FLOAT8_CAPABILITY:
        raise ValueError(
            f"fp8 weights need a GPU with 8-bit floats, of compute capability {_dotted(triton_plan.FLOAT8_CAPABILITY)} "
            f"(Ada, Hopper, Blackwell), and this one has {_dotted(capability)}: quantise the original checkpoint to "
            'int8 instead (model.quantize("int8"), mambakit quantize --to int8), or call model.dequantize()'
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


# -- few rows: the weight is widened in registers ----------------------------------------------------------------------


def in_registers(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, plan: Product, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias by `product_kernel` or `wide_product_kernel`, into ``out`` (rows, out), contiguous, where it is
    given."""
    (rows, k), n, processors = x.shape, weight.out_features, card_of(x)[0]
    plan = plan.spread(rows, n, k, processors)
    splits, columns = plan.splits(rows, n, k, processors)
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device) if out is None else out
    parts = y if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=x.device)
    if plan.hopper:
        _wide_product(x, weight, bias, plan, parts, splits, columns)
    else:
        kernels.product_kernel[(triton.cdiv(n, plan.BN) * triton.cdiv(rows, plan.BB), splits)](
            x, weight.data, weight.scales, bias, parts, rows, x.stride(0),
            n, k, columns, BITS[weight.format], weight.group, BN=plan.BN, BB=plan.BB, BK=plan.BK, STAGES=plan.stages,
            SPLITS=splits, AFTER=plan.after, ROWS_FIRST=plan.rows_first, ASM=ASM, HAS_BIAS=bias is not None,
            num_warps=plan.warps,
        )  # fmt: skip
    if splits > 1:
        size = min(1024, triton.next_power_of_2(n))
        kernels.sum_kernel[(rows, triton.cdiv(n, size))](
            parts, bias, y, rows, n, splits, SIZE=size, HAS_BIAS=bias is not None, num_warps=4
        )
    return y


def takes_hopper(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `wide_product_kernel` serves: on a Hopper, in half precision, with rows that TMA can read."""
    row_bytes = weight.data.stride(0) * weight.data.itemsize
    fits = triton_plan.takes_hopper(card_of(x)[2], x.dtype, weight.format, row_bytes, weight.in_features)
    return ASM and fits and weight.data.data_ptr() % 16 == 0


def _wide_product(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, plan: Product, y: Tensor, splits: int, columns: int
) -> None:
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    bits = BITS[weight.format]
    words = weight.data.view(torch.int16)
    hopper_kernels.wide_product_kernel[(triton.cdiv(y.shape[-1], plan.BN) * triton.cdiv(x.shape[0], plan.BB), splits)](
        _tiles(x, plan.BB, plan.BK), _tiles(words, plan.BN, plan.BK * bits // 16), weight.scales, bias, y,
        x.shape[0], y.shape[-1], x.shape[1], columns,
        **wide_constants(plan, bits, weight.group, splits > 1, bias is not None),
        num_warps=plan.warps, maxnreg=plan.registers,
    )  # fmt: skip


def wide_constants(plan: Product, bits: int, group: int, partial: bool, has_bias: bool) -> dict[str, int]:
    """What `wide_product_kernel` is compiled for."""
    return {
        "BITS": bits, "GROUP": group, "BN": plan.BN, "BB": plan.BB, "BK": plan.BK, "STAGES": plan.stages,
        "PARTIAL": partial, "HAS_BIAS": has_bias,
    }  # fmt: skip


def _tiles(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For TMA."""
    layout = _layout(rows, columns, matrix.dtype)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element[dtype])


# -- many rows: the weight is widened in memory ------------------------------------------------------------------------


def widened(x: Tensor, weight: PackedWeight, bias: Tensor | None, slab: int = 0) -> Tensor:
    """x weight^T + bias by PyTorch's product, the weight in x's dtype, ``slab`` bytes of it at a time (0: all)."""
    n, k = weight.out_features, weight.in_features
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)

    def multiply(w: Tensor, first: int, count: int) -> None:
        out = y[:, first : first + count]
        if bias is None:
            torch.mm(x, w.T, out=out)
        else:
            torch.addmm(bias[first : first + count], x, w.T, out=out)

    if weight.format not in BITS:
        multiply(weight.dequantized().to(x.dtype), 0, n)
    else:
        parts = triton_plan.slabs(n, k, x.dtype.itemsize, slab)
        memory = torch.empty((parts[0][1], k), dtype=x.dtype, device=x.device)
        for first, count in parts:
            widen_into(memory[:count], weight, first)
            multiply(memory[:count], first, count)
    return y


def widen_into(y: Tensor, weight: PackedWeight, first: int = 0) -> None:
    """Rows of an int8, int4 or fp8 weight from ``first`` on into y (rows, in), contiguous, in its dtype."""
    (down, across), options = widening(y.shape[0], weight.out_features, y.shape[1], weight.format, weight.group)
    kernels.widen_kernel[(down, across)](weight.data, weight.scales, y, first, **options)


def widening(rows: int, n: int, k: int, format: str, group: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs and constants of `widen_kernel` for so many rows of a weight (n, k)."""
    block = max(128, min(1024, triton.next_power_of_2(k)))
    BN = 4096 // block
    constants = {"N": n, "K": k, "BITS": BITS[format], "GROUP": group, "BN": BN, "BK": block, "ASM": ASM}
    return (triton.cdiv(rows, BN), triton.cdiv(k, block)), constants | {"num_warps": 4}


def dequantize(data, scales, starts, columns, values, format, in_features, group):
    """`mambakit::dequantize`: the weight (out, in) in float32."""
    weight = packed_of(data, scales, starts, columns, values, format, in_features, group)
    if format not in BITS or not data.numel():
        found = weight.dequantized()
        return found.clone() if found is data else found
    with torch.cuda.device_of(data):
        y = torch.empty((data.shape[0], in_features), dtype=torch.float32, device=data.device)
        widen_into(y, weight)
    return y


# -- many rows of fp8: the rows of x are float8, too -------------------------------------------------------------------


def rows_in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, k) with adjacent columns in float8, and the scales (rows, 1) of its rows: `packed.to_float8`'s bits."""
    rows, k = x.shape
    q = torch.empty((rows, k), dtype=FLOAT8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(k)
    kernels.float8_kernel[(rows,)](x, q.view(torch.uint8), scales, x.stride(0), k, SIZE=size, num_warps=row_warps(size))
    return q, scales


def row_warps(size: int) -> int:
    """Warps for a row of so many elements, which one program has in registers."""
    return min(16, max(1, size // 512))


def scaled(q: Tensor, scales: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q scales) weight^T + bias; PyTorch's product of float8 with scales of rows gives bfloat16."""
    assert weight.scales is not None
    y = torch.empty((q.shape[0], weight.out_features), dtype=torch.bfloat16, device=q.device)
    y = scaled_into(y, q, scales, weight.data, weight.scales).to(dtype)
    return y if bias is None else y.add_(bias)


def scaled_into(y: Tensor, q: Tensor, scales: Tensor, data: Tensor, weight_scales: Tensor) -> Tensor:
    """y bfloat16 = (q scales) weight^T, of an fp8 weight's bits and the scales of its rows."""
    weight = data.view(FLOAT8).T
    return torch._scaled_mm(
        q, weight, scale_a=scales, scale_b=weight_scales.T, out_dtype=torch.bfloat16, use_fast_accum=True, out=y
    )


def normed_linear(
    x, norm, residual, eps, residual_dtype, dtype, data, scales, starts, columns, values, bias, format, in_features,
    group,
):  # fmt: skip
    """`mambakit::normed_linear`: (linear of the norm, residual)."""
    weight = packed_of(data, scales, starts, columns, values, format, in_features, group)
    require_float8(x, weight)
    rows = x.numel() // max(1, in_features)
    fused = format == "fp8" and triton_plan.takes_float8(dtype, rows, weight.out_features, in_features)
    if not fused or torch.float64 in (x.dtype, residual_dtype):
        y, kept = rms_norm(x, norm, residual, eps, residual_dtype, dtype)
        return linear(y, data, scales, starts, columns, values, bias, format, in_features, group), kept
    with torch.cuda.device_of(x), no_autocast(x.device):
        q, row_scales, kept = norm_in_float8(x, norm, residual, eps, residual_dtype, dtype)
        y = scaled(q, row_scales, weight, None if bias is None else bias.contiguous(), dtype)
    return y.unflatten(0, x.shape[:-1]), kept


def norm_in_float8(x, norm, residual, eps, residual_dtype, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The float8 rows and scales of the RMS norm, rounded to ``dtype`` before; and the residual stream."""
    h = x.shape[-1]
    kept = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    flat = x.reshape(-1, h)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    before = None if residual is None else residual.reshape(-1, h)
    before = before if before is None or before.stride(1) == 1 else before.contiguous()
    q = torch.empty((flat.shape[0], h), dtype=FLOAT8, device=x.device)
    scales = torch.empty((flat.shape[0], 1), dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(h)
    kernels.norm_float8_kernel[(flat.shape[0],)](
        flat, norm.contiguous(), before, kept, q.view(torch.uint8), scales, flat.stride(0),
        0 if before is None else before.stride(0), eps,
        h, SIZE=size, HAS_RESIDUAL=before is not None, ROUNDED=1 + _HALF.index(dtype), num_warps=row_warps(size),
    )  # fmt: skip
    return q, scales, kept
