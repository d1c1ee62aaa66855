"""linear_cross_entropy on a GPU: cuBLAS for the three products of a chunk, one Triton kernel between them.

Forward and backward take three products of 2 tokens v h operations each, and the memory traffic of the logits. The
head's product is written in float32 (a bfloat16 logit of 10 is off by up to 0.03, its probability by 3 %), the kernel
reads a row once as far as an SM's registers hold it (51,200 logits; the rest twice, and rows of more than
90,000 twice as a whole) and writes softmax - onehot in the inputs' dtype for the other two products. That gradient is
not divided by the number of tokens here: in float16 it would vanish. dweight is added over chunks in float32 inside
cuBLAS (beta = 1), which reads and writes it once a chunk, so chunks are as large as memory reasonably allows. dhidden
is a sum over the vocabulary: cuBLAS splits one that long over CTAs and, for a bfloat16 result, may add their parts
in bfloat16 (4.4e-3 at v = 50277 on an H100, where rounding the result once is 1.7e-3), so it too is written in float32
and rounded after.

Liger-Kernel's fused linear cross-entropy was the candidate to depend on. It reads the number of targets back to the
host at every call (no CUDA graphs), keeps logits in the inputs' dtype, is not a torch.library op and has no path
without Triton; the kernel it would save is the sixty lines below.
"""

# A kernel's tuple of tensors grows by concatenation, the form Triton compiles; types there are Triton's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl

from mambakit.ops._products import product
from mambakit.ops.linear_cross_entropy import chunked

# Logits of a chunk: 512 MiB of float32, half of it again for their gradient, at most as much for a float32 dhidden.
CHUNK_LOGITS = 2**27
# Blocks of 2,048 logits that the registers of 16 warps hold, and the longest row of which they hold a part.
HELD_BLOCKS = 25
LONGEST_HELD = 90000


@triton.jit
def _softmax_kernel(
    logits, targets, losses, dlogits, stride_l, stride_d, ignore_index,
    V: tl.constexpr, BLOCK_V: tl.constexpr, REST: tl.constexpr, NEED_GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row's logits from REST on stay in registers; those before it are read again for the gradient."""
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
        for begin in range(0, REST, BLOCK_V):
            z = tl.load(logits + begin + i)
            higher = tl.maximum(peak, z)
            mass = mass * tl.exp(peak - higher) + tl.exp(z - higher)
            peak = higher
        BLOCKS: tl.constexpr = (V - REST + BLOCK_V - 1) // BLOCK_V  # that stay in registers
        kept = ()
        for begin in tl.static_range(REST, V, BLOCK_V):
            if begin + BLOCK_V <= V:  # without a mask, which keeps loads from being whole vectors where V is odd
                z = tl.load(logits + begin + i)
            else:
                z = tl.load(logits + begin + i, mask=begin + i < V, other=float("-inf"))
            kept = kept + (z,)
        higher = peak
        for k in tl.static_range(BLOCKS):
            higher = tl.maximum(higher, kept[k])
        top = tl.max(higher, axis=0)
        if REST:
            mass *= tl.exp(peak - top)
        powers = ()
        for k in tl.static_range(BLOCKS):
            powers = powers + (tl.exp(kept[k] - top),)
            mass += powers[k]
        total = tl.sum(mass, axis=0)
        lse = top + tl.log(total)
        tl.store(losses + row, tl.where(known, lse - aimed, float("nan")))
        if NEED_GRADIENT:
            scale = 1.0 / total
            for k in tl.static_range(BLOCKS):
                begin = REST + k * BLOCK_V
                g = powers[k] * scale
                if begin + BLOCK_V <= V:
                    tl.store(dlogits + begin + i, g.to(dlogits.dtype.element_ty))
                else:
                    tl.store(dlogits + begin + i, g.to(dlogits.dtype.element_ty), mask=begin + i < V)
            # Backwards: what was read last is what L2 still holds.
            for block in range(BLOCK_V, REST + BLOCK_V, BLOCK_V):
                j = REST - block + i
                g = tl.exp(tl.load(logits + j) - lse)
                tl.store(dlogits + j, g.to(dlogits.dtype.element_ty))
            tl.debug_barrier()  # the target's place is written twice
            tl.store(dlogits + target, (tl.exp(aimed - lse) - 1.0).to(dlogits.dtype.element_ty), mask=known)


def softmax_plan(v: int) -> tuple[int, int, int]:
    """(BLOCK_V, REST, warps). Registers hold as many blocks as there is room for, of each 4 logits a thread; where most
    of a row would be read twice all the same, more rows at a time are worth more, and they hold one block only."""
    block = min(triton.next_power_of_2(v), 2048)
    held = HELD_BLOCKS if v <= LONGEST_HELD else 1
    return block, max(0, triton.cdiv(v, block) - held) * block, max(1, block // 128)


def forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight):
    """`mambakit::linear_cross_entropy`: (summed loss, dhidden, dweight)."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return chunked.forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight)
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
    block, rest, num_warps = softmax_plan(v)
    with torch.cuda.device_of(hidden):
        for begin in range(0, tokens, max(step, 1)):
            count = min(step, tokens - begin)
            x, z, dz = hidden[begin : begin + count], logits[:count], dlogits[:count]
            product(x, w.T, z)
            _softmax_kernel[(count,)](
                z, targets[begin:], losses[begin:], dz, z.stride(0), dz.stride(0), ignore_index,
                V=v, BLOCK_V=block, REST=rest, NEED_GRADIENT=need, num_warps=num_warps,
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
