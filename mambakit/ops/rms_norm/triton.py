"""rms_norm on a GPU, in Triton. Contract: `chunked.py` and `api.py`.

Memory bound: forward reads x and the residual and writes the new residual and y in one pass, with the whole row in
registers. Backward reads dy, the saved sum and the gradient of the residual stream, writes dx and the residual's
gradient, and recomputes the row's scale instead of loading a saved one. Each backward program takes a fixed run of
rows and keeps its partial sum of dweight in registers; a second kernel adds the partial sums in order, so the same
inputs give the same bits. float64 goes to plain PyTorch (`chunked.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.rms_norm import chunked


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, residual, y, kept, rows, h, stride_x, stride_r, eps,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK_H)
    mask = (row < rows)[:, None] & (i < h)[None, :]
    total = tl.load(x + (row * stride_x)[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + (row * stride_r)[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    # The rounded sum is normalised, which is all that the backward pass sees.
    rounded = total.to(kept.dtype.element_ty)
    tl.store(kept + (row * h)[:, None] + i[None, :], rounded, mask=mask)
    total = rounded.to(tl.float32)
    result = total * tl.rsqrt(tl.sum(total * total, axis=1) / h + eps)[:, None]
    if HAS_WEIGHT:
        result *= tl.load(weight + i, mask=i < h, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (row * h)[:, None] + i[None, :], result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "runs"])
def _backward_kernel(
    dy, dkept, kept, weight, dx, dresidual, partials, rows, h, runs, stride_y, stride_k, eps,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DKEPT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_H)
    inside = (i < h)[None, :]
    if HAS_WEIGHT:
        scale = tl.load(weight + i, mask=i < h, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((ROWS, BLOCK_H), tl.float32)
    run = program * 0
    while run < runs:
        row = (program * runs + run) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside
        place = (row * h)[:, None] + i[None, :]
        total = tl.load(kept + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + (row * stride_y)[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        # Loaded before it is needed, so that the row's three reads are in flight together.
        if HAS_DKEPT:
            passed = tl.load(dkept + (row * stride_k)[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(total * total, axis=1) / h + eps)[:, None]
        normed = total * inverse
        if HAS_WEIGHT:
            sums += grad * normed
            grad *= scale
        result = inverse * (grad - normed * (tl.sum(grad * normed, axis=1) / h)[:, None])
        if HAS_DKEPT:
            result += passed
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            tl.store(dresidual + place, result.to(dresidual.dtype.element_ty), mask=mask)
        run += 1
    if HAS_WEIGHT:
        tl.store(partials + program * h + i, tl.sum(sums, axis=0), mask=i < h)


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(partials, dweight, count, h, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    i = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((ROWS, BLOCK_H), tl.float32)
    begin = 0
    # Not range(): Triton 3.6's interpreter cannot turn a kernel argument into its bound (NumPy 2.4).
    while begin < count:
        row = begin + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (i < h)[None, :]
        total += tl.load(partials + (row.to(tl.int64) * h)[:, None] + i[None, :], mask=mask, other=0.0)
        begin += ROWS
    tl.store(dweight + i, tl.sum(total, axis=0).to(dweight.dtype.element_ty), mask=i < h)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """(rows, h) with a stride: a view if there is one, as of a slice of a wider projection."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else 0


def _block(h: int) -> tuple[int, int, int]:
    """(rows, BLOCK_H, warps) of a program: about 16 elements per thread, and several short rows together."""
    block = triton.next_power_of_2(h)
    rows = max(1, 1024 // block)
    return rows, block, min(max(rows * block // 512, 1), 32)


def forward(x, weight, residual, eps, residual_dtype, out_dtype):
    """`mambakit::rms_norm`: (y, residual)."""
    if torch.float64 in (x.dtype, residual_dtype, out_dtype):
        return chunked.forward(x, weight, residual, eps, residual_dtype, out_dtype)
    h = x.shape[-1]
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    kept = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            x, stride_x = _rows(x)
            residual, stride_r = (None, 0) if residual is None else _rows(residual)
            weight = None if weight is None else weight.contiguous()
            rows, block, num_warps = _block(h)
            _forward_kernel[(triton.cdiv(x.shape[0], rows),)](
                x, weight, residual, y, kept, x.shape[0], h, stride_x, stride_r, eps,
                ROWS=rows, BLOCK_H=block, HAS_WEIGHT=weight is not None, HAS_RESIDUAL=residual is not None,
                num_warps=num_warps,
            )  # fmt: skip
    return y, kept


def _programs(device: torch.device, num_warps: int) -> int:
    """Backward programs that fill the card once or twice: more would only write more partial sums of dweight."""
    # On a CPU the kernels run in Triton's interpreter.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, 32 // num_warps)


def backward(dy, dresidual_out, residual_out, weight, eps, x_dtype, has_residual):
    """`mambakit::rms_norm_backward`: (dx, dweight, dresidual)."""
    if torch.float64 in (dy.dtype, residual_out.dtype, x_dtype):
        return chunked.backward(dy, dresidual_out, residual_out, weight, eps, x_dtype, has_residual)
    h = residual_out.shape[-1]
    device = residual_out.device
    dx = torch.empty(residual_out.shape, dtype=x_dtype, device=device)
    dresidual = torch.empty(residual_out.shape if has_residual else (0,), dtype=residual_out.dtype, device=device)
    dweight = (
        residual_out.new_empty(0) if weight is None else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    )
    if residual_out.numel():
        with torch.cuda.device_of(residual_out):
            dy, stride_y = _rows(dy)
            dkept, stride_k = (None, 0) if dresidual_out is None else _rows(dresidual_out)
            weight = None if weight is None else weight.contiguous()
            rows, block, num_warps = _block(h)
            groups = triton.cdiv(dy.shape[0], rows)
            runs = triton.cdiv(groups, _programs(device, num_warps))
            programs = triton.cdiv(groups, runs)
            partials = torch.empty((programs, h), dtype=torch.float32, device=device)
            _backward_kernel[(programs,)](
                dy, dkept, residual_out.contiguous(), weight, dx, dresidual, partials,
                dy.shape[0], h, runs, stride_y, stride_k, eps,
                ROWS=rows, BLOCK_H=block, HAS_WEIGHT=weight is not None, HAS_DKEPT=dkept is not None,
                HAS_RESIDUAL=has_residual, num_warps=num_warps,
            )  # fmt: skip
            if weight is not None:
                # Bound by the latency of dependent loads: few programs with many loads in flight each.
                _sum_partials_kernel[(triton.cdiv(h, 16),)](
                    partials, dweight, programs, h, ROWS=512, BLOCK_H=16, num_warps=8
                )
    return dx, dweight, dresidual
