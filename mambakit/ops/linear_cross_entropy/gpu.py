"""linear_cross_entropy on a GPU: cuBLAS for the three products of a chunk, one Triton kernel between them.

Forward and backward need three products of 2 tokens v h operations; what is added to them is traffic of the logits. The
head's product is written in float32 (a bfloat16 logit of 10 is off by up to 0.03, its probability by 3 %), the kernel
reads each row twice (maximum and sum together; then the gradient, from L2 for the most part) and writes
softmax - onehot in the inputs' dtype for the other two products. That gradient is not divided by the number of tokens
here: in float16 it would vanish. dweight is added over chunks in float32 inside cuBLAS (beta = 1), which reads and
writes it once a chunk, so chunks are as large as memory reasonably allows. dhidden is a sum over the vocabulary: cuBLAS splits
one that long among blocks and, for a bfloat16 result, may add their parts in bfloat16 (4.4e-3 at v = 50277 on an H100, where
rounding the result once is 1.7e-3), so it too is written in float32 and rounded after.

Liger-Kernel's fused linear cross-entropy was the candidate to depend on. It reads the number of targets back to the
host at every call (no CUDA graphs), keeps logits in the inputs' dtype, is not a torch.library op and has no path
without Triton; the kernel it would save is the forty lines below.
"""

import torch
import triton
import triton.language as tl

from mambakit.ops._products import product
from mambakit.ops.linear_cross_entropy import reference

# Logits of a chunk: 512 MiB of float32, half of it again for their gradient, and as much at most for dhidden in float32.
CHUNK_LOGITS = 2**27


@triton.jit
def _softmax_kernel(
    logits, targets, losses, dlogits, stride_l, stride_d, ignore_index,
    V: tl.constexpr, BLOCK_V: tl.constexpr, NEED_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * stride_l
    dlogits += row * stride_d
    i = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if NEED_GRADIENT:
            for begin in range(0, V, BLOCK_V):
                tl.store(dlogits + begin + i, tl.zeros((BLOCK_V,), dlogits.dtype.element_ty), mask=begin + i < V)
    else:
        # Read before the reductions' barrier: past it another warp may have put the gradient in its place (in float32).
        known = (target >= 0) & (target < V)
        aimed = tl.load(logits + target, mask=known, other=0.0)
        # Every lane keeps its own running maximum and sum: no reduction, so no barrier, until the row is read.
        # The start is finite, so that a lane which sees only the row's end (-inf) stays free of NaN.
        peak = tl.full((BLOCK_V,), -1.0e30, tl.float32)
        mass = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, V, BLOCK_V):
            z = tl.load(logits + begin + i, mask=begin + i < V, other=float("-inf"))
            higher = tl.maximum(peak, z)
            mass = mass * tl.exp(peak - higher) + tl.exp(z - higher)
            peak = higher
        top = tl.max(peak, axis=0)
        lse = top + tl.log(tl.sum(mass * tl.exp(peak - top), axis=0))
        tl.store(losses + row, tl.where(known, lse - aimed, float("nan")))
        if NEED_GRADIENT:
            # Backwards: what was read last is what L2 still holds.
            for block in range(0, V, BLOCK_V):
                j = (V - 1) // BLOCK_V * BLOCK_V - block + i
                z = tl.load(logits + j, mask=j < V, other=float("-inf"))
                g = tl.exp(z - lse) - tl.where(j == target, 1.0, 0.0)
                tl.store(dlogits + j, g.to(dlogits.dtype.element_ty), mask=j < V)


def softmax_block(v: int) -> tuple[int, int]:
    """(BLOCK_V, warps): 8 logits per thread, so that few lanes idle at a small vocabulary."""
    block = min(triton.next_power_of_2(v), 4096)
    return block, max(1, block // 256)


def forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight):
    """`mambakit::linear_cross_entropy`: (summed loss, dhidden, dweight)."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return reference.forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight)
    tokens, h = hidden.shape
    v = weight.shape[0]
    device, dtype = hidden.device, hidden.dtype
    need = need_dhidden or need_dweight
    # Rows of 64 logits' multiple: an odd vocabulary would make every row unaligned, for cuBLAS and for the kernel.
    width = triton.cdiv(v, 64) * 64
    step = min(tokens, max(1, CHUNK_LOGITS // max(width, h)))
    if step > 256:
        step = step // 256 * 256  # whole tiles of the products
    w = weight.to(dtype)
    targets = targets.contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=device)
    dhidden = torch.empty((tokens, h) if need_dhidden else (0,), dtype=dtype, device=device)
    dweight = torch.zeros((v, h) if need_dweight else (0,), dtype=torch.float32, device=device)
    logits = torch.empty((step, width), dtype=torch.float32, device=device)[:, :v]
    # In float32 the gradient takes the place of the logits, each element written by the lane that has just read it.
    dlogits = logits
    if need and dtype != torch.float32:
        dlogits = torch.empty((step, width), dtype=dtype, device=device)[:, :v]
    wide = torch.empty(
        (step, h) if need_dhidden and dtype != torch.float32 else (0,), dtype=torch.float32, device=device
    )
    block, num_warps = softmax_block(v)
    with torch.cuda.device_of(hidden):
        for begin in range(0, tokens, max(step, 1)):
            count = min(step, tokens - begin)
            x, z, dz = hidden[begin : begin + count], logits[:count], dlogits[:count]
            product(x, w.T, z)
            _softmax_kernel[(count,)](
                z, targets[begin:], losses[begin:], dz, z.stride(0), dz.stride(0), ignore_index,
                V=v, BLOCK_V=block, NEED_GRADIENT=need, num_warps=num_warps,
            )  # fmt: skip
            if need_dhidden:
                part = dhidden[begin : begin + count]
                exact = part if dtype == torch.float32 else wide[:count]
                product(dz, w, exact)
                if exact is not part:
                    part.copy_(exact)
            if need_dweight:
                product(dz.T, x, dweight, accumulate=begin > 0)
    return losses.sum(), dhidden, dweight.to(weight.dtype)
