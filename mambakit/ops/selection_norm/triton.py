"""selection_norm on a GPU, in Triton. Contract: `chunked.py` and `api.py`.

One pass over x_proj's output, whose three parts a program normalises one after the other. The backward pass computes
the scales again; with weights each program sums a fixed run of rows, and a second kernel adds the programs' sums in
order, so the same inputs give the same bits. float64 goes to plain PyTorch (`chunked.py`).
"""

import torch
import triton
import triton.language as tl

from mambakit.ops.selection_norm import chunked


@triton.jit
def _normalise(x, weight, y, at, mask, i, size, eps, HAS_WEIGHT: tl.constexpr):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / size + eps)[:, None]
    if HAS_WEIGHT:
        value *= tl.load(weight + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, dt_weight, B_weight, C_weight, y, rows, eps,
    R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row * (R + 2 * N))[:, None]
    inside = (row < rows)[:, None]
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    of_dt, of_n = inside & (r < R)[None, :], inside & (n < N)[None, :]
    _normalise(x, dt_weight, y, at + r[None, :], of_dt, r, R, eps, HAS_WEIGHT)
    _normalise(x, B_weight, y, at + R + n[None, :], of_n, n, N, eps, HAS_WEIGHT)
    _normalise(x, C_weight, y, at + R + N + n[None, :], of_n, n, N, eps, HAS_WEIGHT)


@triton.jit
def _differentiate(dy, x, weight, dx, at, mask, i, size, eps, HAS_WEIGHT: tl.constexpr):
    """Stores dx; returns the rows' gradients of the weight."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / size + eps)[:, None]
    normed = value * inverse
    dweight = grad * normed
    if HAS_WEIGHT:
        grad *= tl.load(weight + i, mask=i < size, other=0.0).to(tl.float32)[None, :]
    result = inverse * (grad - normed * (tl.sum(grad * normed, axis=1) / size)[:, None])
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)
    return dweight


@triton.jit(do_not_specialize=["rows", "runs"])
def _backward_kernel(
    dy, x, dt_weight, B_weight, C_weight, dx, partials, rows, runs, eps,
    R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """partials (programs, R + 2 N) float32, with weights."""
    program = tl.program_id(0).to(tl.int64)
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    of_dt = tl.zeros((ROWS, BLOCK_R), tl.float32)
    of_B = tl.zeros((ROWS, BLOCK_N), tl.float32)
    of_C = tl.zeros((ROWS, BLOCK_N), tl.float32)
    run = program * 0
    while run < runs:
        row = (program * runs + run) * ROWS + tl.arange(0, ROWS)
        at = (row * (R + 2 * N))[:, None]
        inside = (row < rows)[:, None]
        dt_mask, n_mask = inside & (r < R)[None, :], inside & (n < N)[None, :]
        of_dt += _differentiate(dy, x, dt_weight, dx, at + r[None, :], dt_mask, r, R, eps, HAS_WEIGHT)
        of_B += _differentiate(dy, x, B_weight, dx, at + R + n[None, :], n_mask, n, N, eps, HAS_WEIGHT)
        of_C += _differentiate(dy, x, C_weight, dx, at + R + N + n[None, :], n_mask, n, N, eps, HAS_WEIGHT)
        run += 1
    if HAS_WEIGHT:
        to = partials + program * (R + 2 * N)
        tl.store(to + r, tl.sum(of_dt, axis=0), mask=r < R)
        tl.store(to + R + n, tl.sum(of_B, axis=0), mask=n < N)
        tl.store(to + R + N + n, tl.sum(of_C, axis=0), mask=n < N)


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(
    partials, ddt_weight, dB_weight, dC_weight, count,
    R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    begin = 0
    # Not range(): Triton 3.6's interpreter cannot turn a kernel argument into its bound (NumPy 2.4).
    while begin < count:
        row = begin + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (i < R + 2 * N)[None, :]
        total += tl.load(partials + (row.to(tl.int64) * (R + 2 * N))[:, None] + i[None, :], mask=mask, other=0.0)
        begin += ROWS
    sums = tl.sum(total, axis=0)
    tl.store(ddt_weight + i, sums.to(ddt_weight.dtype.element_ty), mask=i < R)
    tl.store(dB_weight + (i - R), sums.to(dB_weight.dtype.element_ty), mask=(i >= R) & (i < R + N))
    tl.store(dC_weight + (i - R - N), sums.to(dC_weight.dtype.element_ty), mask=(i >= R + N) & (i < R + 2 * N))


def sizes(rank: int, n: int) -> dict[str, int]:
    """A program's constants: about 16 elements of dt per thread, and several short rows together."""
    block = triton.next_power_of_2(rank)
    rows = max(1, 1024 // block)
    warps = min(max(rows * block // 512, 1), 16)
    return {
        "R": rank, "N": n, "ROWS": rows, "BLOCK_R": block, "BLOCK_N": triton.next_power_of_2(n), "num_warps": warps,
    }  # fmt: skip


SUM = {"ROWS": 128, "BLOCK": 16, "num_warps": 4}  # of `_sum_partials_kernel`


def cut(rows: int, each: dict[str, int], device: torch.device) -> tuple[int, int]:
    """(programs of the backward pass, runs of rows of each): enough to fill the card once or twice."""
    # On a CPU the kernels run in Triton's interpreter.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    groups = triton.cdiv(rows, each["ROWS"])
    runs = triton.cdiv(groups, processors * max(1, 32 // each["num_warps"]))
    return triton.cdiv(groups, runs), runs


def forward(selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm`."""
    if selected.dtype == torch.float64:
        return chunked.forward(selected, dt_weight, B_weight, C_weight, rank, eps)
    y = torch.empty(selected.shape, dtype=selected.dtype, device=selected.device)
    if selected.numel():
        with torch.cuda.device_of(selected):
            x, width = selected.contiguous(), selected.shape[-1]
            weights = [None if w is None else w.contiguous() for w in (dt_weight, B_weight, C_weight)]
            rows, each = x.numel() // width, sizes(rank, (width - rank) // 2)
            _forward_kernel[(triton.cdiv(rows, each["ROWS"]),)](
                x, *weights, y, rows, eps, HAS_WEIGHT=dt_weight is not None, **each
            )  # fmt: skip
    return y


def backward(dy, selected, dt_weight, B_weight, C_weight, rank, eps):
    """`mambakit::selection_norm_backward`."""
    if torch.float64 in (dy.dtype, selected.dtype):
        return chunked.backward(dy, selected, dt_weight, B_weight, C_weight, rank, eps)
    device, width = selected.device, selected.shape[-1]
    given = dt_weight, B_weight, C_weight
    dx = torch.empty(selected.shape, dtype=selected.dtype, device=device)
    dweights = [
        torch.empty(0, dtype=torch.float32, device=device)
        if w is None
        else torch.zeros_like(w, memory_format=torch.contiguous_format)
        for w in given
    ]
    if selected.numel():
        with torch.cuda.device_of(selected):
            weighted, n = dt_weight is not None, (width - rank) // 2
            weights = [None if w is None else w.contiguous() for w in given]
            rows, each = selected.numel() // width, sizes(rank, n)
            programs, runs = cut(rows, each, device)
            partials = torch.empty((programs if weighted else 0, width), dtype=torch.float32, device=device)
            _backward_kernel[(programs,)](
                dy.contiguous(), selected.contiguous(), *weights, dx, partials, rows, runs, eps, HAS_WEIGHT=weighted,
                **each,
            )  # fmt: skip
            if weighted:
                _sum_partials_kernel[(triton.cdiv(width, SUM["BLOCK"]),)](
                    partials, *dweights, programs, R=rank, N=n, **SUM
                )
    return dx, *dweights
