"""The product of packed weights and many rows on Hopper, in Gluon: the weight is widened while tensor cores multiply.

The weight is wgmma's first operand, from registers, and x the second, from shared memory. A product takes 16 columns;
while it runs, the next 16 columns of the weight are widened, and packed numbers of the block of 64 columns after them
are read from shared memory. A warp of its own brings both operands by TMA, and zeros beyond their ends. Triton's own
pipeline waits for every product whose operand is in registers; hence Gluon, which leaves that to the kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mambakit.ops.linear.triton_kernels import (
    _INT4_BF0,
    _INT4_BF1,
    _INT4_BF2,
    _INT4_BF3,
    _INT4_F0,
    _INT4_F1,
    _INT4_F2,
    _INT4_F3,
    _INT8_BFLOAT16,
    _INT8_FLOAT16,
    _SCALE_BFLOAT16,
)

# Two bfloat16 in a register times a scale that is the sum of two bfloat16.
_SCALE_PAIR: gl.constexpr = gl.constexpr("""{
    .reg .b32 p, h, l, k0;
    mov.b32 k0, 0x80008000;
    mov.b32 h, {$3, $3};
    mov.b32 l, {$4, $4};
    fma.rn.bf16x2 p, $2, l, k0;
    fma.rn.bf16x2 p, $2, h, p;
    mov.b32 {$0, $1}, p;
}""")
_HALVES: gl.constexpr = gl.constexpr("mov.b32 {$0, $1}, $2;")


@gluon.jit
def _scaled(w, high, low, scale, dtype: gl.constexpr):
    """w (BN, 16) times the scales (BN,) of its rows: ``high`` plus ``low`` in bfloat16, ``scale`` in float32."""
    if dtype == gl.bfloat16:
        found = gl.inline_asm_elementwise(
            _SCALE_BFLOAT16, "=r,r,r,r", [w, high[:, None], low[:, None]], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        found = (w.to(gl.float32) * scale[:, None]).to(dtype)
    return found


@gluon.jit
def _of_bytes(words, high, low, scale, dtype: gl.constexpr, A: gl.constexpr):
    """(BN, 16) of words (BN, 8) of two bytes each, scaled. Bytes are widened where shared memory gives them."""
    if dtype == gl.bfloat16:
        pairs = gl.inline_asm_elementwise(_INT8_BFLOAT16, "=r,=r,r", [words], dtype=gl.int32, is_pure=True, pack=2)
        even, odd = gl.inline_asm_elementwise(
            _SCALE_PAIR, "=h,=h,r,h,h", [pairs, high[:, None], low[:, None]], dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        pairs = gl.inline_asm_elementwise(_INT8_FLOAT16, "=r,=r,r", [words], dtype=gl.int32, is_pure=True, pack=2)
        even, odd = gl.inline_asm_elementwise(
            _HALVES, "=h,=h,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
        even = (even.to(gl.float32) * scale[:, None]).to(gl.float16)
        odd = (odd.to(gl.float32) * scale[:, None]).to(gl.float16)
    joined = gl.join(even, odd).reshape([words.shape[0], 16])
    return gl.convert_layout(joined, A, assert_trivial=True)


@gluon.jit
def _of_nibbles(words, part: gl.constexpr, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        asm: gl.constexpr = (
            (_INT4_BF0 if part == 0 else _INT4_BF1) if part < 2 else (_INT4_BF2 if part == 2 else _INT4_BF3)
        )
        found = gl.inline_asm_elementwise(asm, "=r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        asm16: gl.constexpr = (
            (_INT4_F0 if part == 0 else _INT4_F1) if part < 2 else (_INT4_F2 if part == 2 else _INT4_F3)
        )
        found = gl.inline_asm_elementwise(asm16, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    return found


@gluon.jit
def _multiply(
    x, data, scales, ready, free, xs, ws, n0, begin, steps, groups, N,
    BITS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, BB: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """((BN, BB) float32,): the products of all steps."""
    BLOCKS: gl.constexpr = BK // 64
    dtype: gl.constexpr = x.dtype
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=C, k_width=2)
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=C, k_width=1) if BITS == 8 else A
    SHARED: gl.constexpr = (GROUP if GROUP < BK else BK) // 16  # parts of a step that share a scale
    row = gl.minimum(n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, Q)), N - 1)
    place = scales + row.to(gl.int64) * groups
    total = gl.zeros((BN, BB), gl.float32, layout=C)
    scale = gl.load(place + begin // GROUP)
    upcoming = gl.load(place + gl.minimum((begin + SHARED * 16) // GROUP, groups - 1))
    mbarrier.wait(ready.index(0), 0)
    # q0 to q3: the four parts of a block, packed; of int4 q0 has all of them, and q1 has those of the next block.
    q0 = ws.index(0).slice(0, 8 if BITS == 8 else 16, dim=1).load(Q)
    q1 = q0
    q2 = q0
    q3 = q0
    if BITS == 8:
        q1 = ws.index(0).slice(8, 8, dim=1).load(Q)
        q2 = ws.index(0).slice(16, 8, dim=1).load(Q)
        q3 = ws.index(0).slice(24, 8, dim=1).load(Q)
    high = scale.to(gl.bfloat16)
    low = (scale - high.to(gl.float32)).to(gl.bfloat16)
    if BITS == 8:
        w = _of_bytes(q0, high, low, scale, dtype, A)
    else:
        w = _scaled(_of_nibbles(q0, 0, dtype), high, low, scale, dtype)
    for step in range(steps):
        slot = step % STAGES
        later = step + 1
        xt = xs.index(slot).permute((1, 0))
        for part in gl.static_range(4 * BLOCKS):
            total = warpgroup_mma(w, xt.slice(16 * part, 16, dim=0), total, is_async=True)
            current = w
            if part == 0:
                earlier = w
            # While this product and the one before it run: packed numbers of the next block come from shared memory ...
            if part == 4 * BLOCKS - 4:
                mbarrier.wait(ready.index(later % STAGES), later // STAGES & 1, pred=later < steps)
            following = ws.index(later % STAGES) if part >= 4 * BLOCKS - 4 else ws.index(slot)
            if BITS == 8:
                q = following.slice((part + 4) % (4 * BLOCKS) * 8, 8, dim=1).load(Q)
                if part % 4 == 0:
                    q0 = q
                elif part % 4 == 1:
                    q1 = q
                elif part % 4 == 2:
                    q2 = q
                else:
                    q3 = q
            elif part % 4 == 0:
                q1 = following.slice((part // 4 + 1) % BLOCKS * 16, 16, dim=1).load(Q)
            # ... and the next 16 columns are widened.
            if (part + 1) % SHARED == 0:
                scale = upcoming
                high = scale.to(gl.bfloat16)
                low = (scale - high.to(gl.float32)).to(gl.bfloat16)
                after = begin + step * BK + (part + 1 + SHARED) * 16
                upcoming = gl.load(place + gl.minimum(after // GROUP, groups - 1))
            if BITS == 8:
                if part % 4 == 0:
                    w = _of_bytes(q1, high, low, scale, dtype, A)
                elif part % 4 == 1:
                    w = _of_bytes(q2, high, low, scale, dtype, A)
                elif part % 4 == 2:
                    w = _of_bytes(q3, high, low, scale, dtype, A)
                else:
                    w = _of_bytes(q0, high, low, scale, dtype, A)
            else:
                if part % 4 == 3:
                    q0 = q1
                w = _scaled(_of_nibbles(q0, (part + 1) % 4, dtype), high, low, scale, dtype)
            # The product before this one is done: its operand's registers are free, and of a step's first one, the
            # stage before.
            if part == 4 * BLOCKS - 1:  # a step's last one, too: otherwise ptxas finds registers that move meanwhile
                total, current, earlier = warpgroup_mma_wait(0, deps=(total, current, earlier))
            else:
                total, current, earlier = warpgroup_mma_wait(1, deps=(total, current, earlier))
            earlier = current
            if part == 0:
                gl.thread_barrier()
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    return (total,)


@gluon.jit
def _produce(
    x, data, ready, free, xs, ws, b, n, begin, steps, BITS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """What a warp of its own does: it fills each stage that the others have left."""
    for step in range(steps):
        slot = step % STAGES
        k = begin + step * BK
        bar = ready.index(slot)
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar, x.block_type.nbytes + data.block_type.nbytes)
        tma.async_copy_global_to_shared(data, [n, k * BITS // 16], bar, ws.index(slot))
        tma.async_copy_global_to_shared(x, [b, k], bar, xs.index(slot))


@gluon.jit(do_not_specialize=["rows", "K", "columns"])
def wide_product_kernel(
    x, data, scales, bias, y, rows, N, K, columns,
    BITS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, BB: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, PARTIAL: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """x weight^T of BN rows of the weight and BB rows of x, over so many columns: one split of K.

    ``x`` and ``data`` are TMA descriptors, of blocks (BB, BK) and (BN, BK BITS / 16) words of 16 bits. y is
    (rows, N) in x's dtype, or, PARTIAL, (splits, rows, N) float32. ``columns`` is a multiple of BK.
    """
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = x.dtype
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BB, 16])
    PADDING: gl.constexpr = 1 if BITS == 8 else (GROUP if GROUP > 64 else 64)

    blocks = (rows + BB - 1) // BB
    b0 = gl.program_id(0) % blocks * BB
    n0 = gl.program_id(0) // blocks * BN
    split = gl.program_id(1)
    begin = split * columns
    steps = columns // BK
    groups = ((K + PADDING - 1) // PADDING * PADDING + GROUP - 1) // GROUP

    xs = gl.allocate_shared_memory(dtype, [STAGES, BB, BK], x.layout)
    ws = gl.allocate_shared_memory(data.dtype, [STAGES, BN, BK * BITS // 16], data.layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    total = gl.warp_specialize(
        [
            (_multiply, (x, data, scales, ready, free, xs, ws, n0, begin, steps, groups, N, BITS, GROUP, BN, BB, BK,
                         STAGES, C)),
            (_produce, (x, data, ready, free, xs, ws, b0, n0, begin, steps, BITS, BK, STAGES)),
        ],
        [1],
        [24],
    )[0]  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
        mbarrier.invalidate(free.index(i))
    if PARTIAL:
        n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, C))
        b = b0 + gl.arange(0, BB, layout=gl.SliceLayout(0, C))
        at = y + (split * rows + b[None, :].to(gl.int64)) * N + n[:, None]
        gl.store(at, total, mask=(n < N)[:, None] & (b < rows)[None, :])
    else:
        if HAS_BIAS:
            m = gl.minimum(n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, C)), N - 1)
            total += gl.load(bias + m).to(gl.float32)[:, None]
        LANES: gl.constexpr = BN // 8 if BN < 256 else 32
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
        turned = gl.convert_layout(total.to(dtype), OUT)
        n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, OUT))
        b = b0 + gl.arange(0, BB, layout=gl.SliceLayout(0, OUT))
        at = y + b[None, :].to(gl.int64) * N + n[:, None]
        gl.store(at, turned, mask=(n < N)[:, None] & (b < rows)[None, :])
