"""The Triton kernels of packed weights: products that widen weights in registers, widening alone, and rows in float8.

`triton.py` launches them, `triton_plan.py` says which product takes which. BITS 8 is int8, 4 is int4, and 1 is fp8; the
layouts are those of `packed.py`. Integers and e4m3 become floats by their bits, without a conversion instruction, so
the kernels need no hardware for 8-bit floats. `numbers_of_int8` and its like take half a dozen instructions a number
down to two where a half dtype holds the numbers exactly: with ASM two at a time, in PTX, else (in the interpreter)
through float32, with the same result.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float_of_int8(q):
    """float32 of int8: as the low bits of 2^23, which is then subtracted."""
    return (q.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def float_of_nibble(words, place):
    """float32 of the signed nibble at bit ``place`` of int32 words."""
    return (((words >> place) & 15) ^ 8 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def float_of_e4m3(byte):
    """float32 of e4m3 bytes, whose 7 lower bits are a float32's exponent and mantissa but for a factor of 2^120."""
    bits = byte.to(tl.int32)
    return ((bits & 127) << 20 | (bits & 128) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36


# Four bytes of int8 as two words of bfloat16: 128 plus the lower 7 bits, less 128, or 256 with the highest bit.
_INT8_BFLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 p, a, c, k0;
    mov.b32 k0, 0xbf80bf80;
    prmt.b32 p, $2, 0, 0x4140;
    lop3.b32 a, p, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 c, p, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, c, k0, a;
    prmt.b32 p, $2, 0, 0x4342;
    lop3.b32 a, p, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 c, p, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, c, k0, a;
}""")
# As float16: 1024 plus the byte with its highest bit turned, less 1152.
_INT8_FLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 w, p, k0;
    mov.b32 k0, 0xe480e480;
    xor.b32 w, $2, 0x80808080;
    prmt.b32 p, w, 0x64646464, 0x4140;
    add.rn.f16x2 $0, p, k0;
    prmt.b32 p, w, 0x64646464, 0x4342;
    add.rn.f16x2 $1, p, k0;
}""")
# Of two int16 words a nibble each: 128 (1024) plus the nibble with its highest bit turned, less 136 (1032). A shift by
# up to 12 bits moves the upper word's bits in above the lower one's nibble.
_INT4_BFLOAT16 = tuple(
    tl.constexpr(f"""{{
    .reg .b32 a, k0, k1;
    mov.b32 k0, 0x3f803f80;
    mov.b32 k1, 0xc308c308;
    shr.b32 a, $1, {4 * part};
    lop3.b32 a, a, 0x000f000f, 0x43084308, 0x6a;
    fma.rn.bf16x2 $0, a, k0, k1;
}}""")
    for part in range(4)
)
_INT4_FLOAT16 = tuple(
    tl.constexpr(f"""{{
    .reg .b32 a, k0, k1;
    mov.b32 k0, 0x3c003c00;
    mov.b32 k1, 0xe408e408;
    shr.b32 a, $1, {4 * part};
    lop3.b32 a, a, 0x000f000f, 0x64086408, 0x6a;
    fma.rn.f16x2 $0, a, k0, k1;
}}""")
    for part in range(4)
)
_INT4_BF0, _INT4_BF1, _INT4_BF2, _INT4_BF3 = _INT4_BFLOAT16
_INT4_F0, _INT4_F1, _INT4_F2, _INT4_F3 = _INT4_FLOAT16
# Four bytes of e4m3: exponent and mantissa shifted into place, times 2^120 (2^8), which is exact.
_E4M3_BFLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 p, m, k0, k1;
    mov.b32 k0, 0x7b807b80;
    mov.b32 k1, 0x80008000;
    prmt.b32 p, $2, 0, 0x1404;
    and.b32 m, p, 0x7f007f00;
    shr.b32 m, m, 4;
    lop3.b32 m, p, 0x80008000, m, 0xea;
    fma.rn.bf16x2 $0, m, k0, k1;
    prmt.b32 p, $2, 0, 0x3424;
    and.b32 m, p, 0x7f007f00;
    shr.b32 m, m, 4;
    lop3.b32 m, p, 0x80008000, m, 0xea;
    fma.rn.bf16x2 $1, m, k0, k1;
}""")
_E4M3_FLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 p, m, k0;
    mov.b32 k0, 0x5c005c00;
    prmt.b32 p, $2, 0, 0x1404;
    and.b32 m, p, 0x7f007f00;
    shr.b32 m, m, 1;
    lop3.b32 m, p, 0x80008000, m, 0xea;
    mul.rn.f16x2 $0, m, k0;
    prmt.b32 p, $2, 0, 0x3424;
    and.b32 m, p, 0x7f007f00;
    shr.b32 m, m, 1;
    lop3.b32 m, p, 0x80008000, m, 0xea;
    mul.rn.f16x2 $1, m, k0;
}""")


@triton.jit
def numbers_of_int8(q, dtype: tl.constexpr, ASM: tl.constexpr):
    """int8 exactly in dtype."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_INT8_BFLOAT16, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(_INT8_FLOAT16, "=r,=r,r", [q], dtype=tl.float16, is_pure=True, pack=4)
    return float_of_int8(q).to(dtype)


@triton.jit
def numbers_of_e4m3(q, dtype: tl.constexpr, ASM: tl.constexpr):
    """e4m3 bytes (uint8) exactly in dtype."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_E4M3_BFLOAT16, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(_E4M3_FLOAT16, "=r,=r,r", [q], dtype=tl.float16, is_pure=True, pack=4)
    return float_of_e4m3(q).to(dtype)


@triton.jit
def numbers_of_nibbles(words, part: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Nibble ``part`` of int16 words exactly in dtype."""
    if ASM and dtype == tl.bfloat16:
        asm: tl.constexpr = (
            (_INT4_BF0 if part == 0 else _INT4_BF1) if part < 2 else (_INT4_BF2 if part == 2 else _INT4_BF3)
        )
        return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    if ASM and dtype == tl.float16:
        asm16: tl.constexpr = (
            (_INT4_F0 if part == 0 else _INT4_F1) if part < 2 else (_INT4_F2 if part == 2 else _INT4_F3)
        )
        return tl.inline_asm_elementwise(asm16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    return float_of_nibble(words.to(tl.int32), 4 * part).to(dtype)


# Two bfloat16 integers times a scale that is the sum of two bfloat16: rounded once, but for 2^-17 of the product.
_SCALE_BFLOAT16: tl.constexpr = tl.constexpr("""{
    .reg .b32 p, k0;
    mov.b32 k0, 0x80008000;
    fma.rn.bf16x2 p, $1, $3, k0;
    fma.rn.bf16x2 $0, $1, $2, p;
}""")


@triton.jit
def scaled_numbers(w, scale, dtype: tl.constexpr, ASM: tl.constexpr):
    """w times float32 scales, in dtype. With ASM one bfloat16 in 1,400 is its neighbour's: two instructions for two
    numbers in place of five."""
    if ASM and dtype == tl.bfloat16:
        high = scale.to(tl.bfloat16)
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            _SCALE_BFLOAT16, "=r,r,r,r", [w, high, low], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return (w.to(tl.float32) * scale).to(dtype)


@triton.jit
def _words_tile(
    data, scales, row, first, dtype: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`weight_tile` of int4."""
    STEP: tl.constexpr = GROUP if GROUP > 64 else 64
    PADDED: tl.constexpr = (K + STEP - 1) // STEP * STEP
    BLOCKS: tl.constexpr = BK // 64
    FAST: tl.constexpr = ASM and not EXACT
    word = first // 4 + tl.arange(0, BK // 4)
    place = data + row[:, None].to(tl.int64) * (PADDED // 4) + word[None, :]
    words = tl.load(place) if EVEN else tl.load(place, mask=(word < PADDED // 4)[None, :], other=0)
    block = first + 64 * tl.arange(0, BLOCKS)
    there = (block < PADDED)[None, :]
    place_scales = scales + row[:, None].to(tl.int64) * (PADDED // GROUP) + (block // GROUP)[None, :]
    scale = tl.load(place_scales, mask=there, other=0.0)[:, :, None]
    upper = scale  # of the block's second half
    if GROUP == 32:
        upper = tl.load(place_scales + 1, mask=there, other=0.0)[:, :, None]
    # Scaled before the four parts are joined, while pairs of neighbours share a register.
    a = scaled_numbers(numbers_of_nibbles(words, 0, dtype, ASM).reshape(BN, BLOCKS, 16), scale, dtype, FAST)
    b = scaled_numbers(numbers_of_nibbles(words, 1, dtype, ASM).reshape(BN, BLOCKS, 16), scale, dtype, FAST)
    c = scaled_numbers(numbers_of_nibbles(words, 2, dtype, ASM).reshape(BN, BLOCKS, 16), upper, dtype, FAST)
    d = scaled_numbers(numbers_of_nibbles(words, 3, dtype, ASM).reshape(BN, BLOCKS, 16), upper, dtype, FAST)
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # (BN, BLOCKS, 16, 2, 2): part 2 u + v of a block is [u, v]
    return joined.permute(0, 1, 3, 4, 2).reshape(BN, BK)


@triton.jit
def _bytes_tile(
    data, scales, row, first, dtype: tl.constexpr,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`weight_tile` of int8 and fp8."""
    k = first + tl.arange(0, BK)
    place = data + row[:, None].to(tl.int64) * K + k[None, :]
    q = tl.load(place) if EVEN else tl.load(place, mask=(k < K)[None, :], other=0)
    if BITS == 1:
        w = numbers_of_e4m3(q, dtype, ASM)
    else:
        SPAN: tl.constexpr = GROUP if GROUP < BK else BK  # columns of the tile that share a scale
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        group = first // GROUP + tl.arange(0, BK // SPAN)
        place_scales = scales + row[:, None].to(tl.int64) * GROUPS + group[None, :]
        scale = tl.load(place_scales) if EVEN else tl.load(place_scales, mask=(group < GROUPS)[None, :], other=0.0)
        w = numbers_of_int8(q, dtype, ASM).reshape(BN, BK // SPAN, SPAN)
        w = scaled_numbers(w, scale[:, :, None], dtype, ASM and not EXACT).reshape(BN, BK)
    return w


@triton.jit
def weight_tile(
    data, scales, row, first, dtype: tl.constexpr,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(BN, BK) of rows ``row`` and columns from ``first`` on, in dtype. fp8's scale, one of a row, is left out.

    EVEN: all columns are there, else those beyond K are 0. EXACT: scaled in float32 and rounded once.
    """
    if BITS == 4:
        w = _words_tile(data, scales, row, first, dtype, K, GROUP, BN, BK, EVEN, EXACT, ASM)
    else:
        w = _bytes_tile(data, scales, row, first, dtype, K, BITS, GROUP, BN, BK, EVEN, EXACT, ASM)
    return w


@triton.jit
def e4m3_of_float(x):
    """The e4m3 bytes (uint8) of float32 x, rounded to nearest, ties to even; beyond 448: 448; of NaN: NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    normal = (((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000  # in units of 2^-9, subnormal
    code = tl.minimum(tl.where(size < 0.015625, small, normal), 126)
    code = tl.where(x == x, code, 127)
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def row_in_float8(x):
    """(bytes, scale) of one row x (columns,) float32: what `packed.to_float8` makes of it."""
    scale = tl.max(tl.abs(x), axis=0) / 448.0
    return e4m3_of_float(tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))), scale


@triton.jit
def _words_part(
    total, x, data, scales, first, row, b_mask,
    K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, AFTER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total (BN, BB) plus the products of a block of 64 columns of an int4 weight, from column ``first`` on."""
    STEP: tl.constexpr = GROUP if GROUP > 64 else 64
    PADDED: tl.constexpr = (K + STEP - 1) // STEP * STEP
    PARTS: tl.constexpr = 2 if GROUP == 32 else 4  # that share a scale
    word = tl.arange(0, 16)
    place = data + row[:, None].to(tl.int64) * (PADDED // 4) + first // 4 + word[None, :]
    place_scales = scales + row.to(tl.int64) * (PADDED // GROUP)
    dtype: tl.constexpr = x.dtype.element_ty
    words = tl.load(place) if EVEN else tl.load(place, mask=first < K, other=0)
    for shared in tl.static_range(0, 4, PARTS):
        scale = tl.load(place_scales + (first + shared * 16) // GROUP, mask=first < K, other=0.0)[:, None]
        sum = tl.zeros_like(total)
        for part in tl.static_range(shared, shared + PARTS):
            k = first + part * 16 + word
            inside = b_mask[None, :] if EVEN else b_mask[None, :] & (k < K)[:, None]
            values = tl.load(x + k[:, None], mask=inside, other=0.0)
            if AFTER:
                w = numbers_of_nibbles(words, part, dtype, ASM)
                sum = tl.dot(w, values, sum, input_precision="ieee")
            else:
                w = (float_of_nibble(words.to(tl.int32), 4 * part) * scale).to(dtype)
                total = tl.dot(w, values, total, input_precision="ieee")
        if AFTER:
            total += sum * scale
    return total


@triton.jit
def _bytes_part(
    total, x, data, scales, first, row, b_mask,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    AFTER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total (BN, BB) plus the products of COLUMNS columns: of int8, which share a scale, or of fp8, unscaled."""
    k = first + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = x.dtype.element_ty
    place = data + row[:, None].to(tl.int64) * K + k[None, :]
    if EVEN:
        q = tl.load(place)
        values = tl.load(x + k[:, None], mask=b_mask[None, :], other=0.0)
    else:
        q = tl.load(place, mask=(k < K)[None, :], other=0)
        values = tl.load(x + k[:, None], mask=b_mask[None, :] & (k < K)[:, None], other=0.0)
    if BITS == 1:
        total = tl.dot(numbers_of_e4m3(q, dtype, ASM), values, total, input_precision="ieee")
    else:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        place_scales = scales + row.to(tl.int64) * GROUPS + first // GROUP
        scale = tl.load(place_scales, mask=first < K, other=0.0)[:, None]
        if AFTER:
            total += tl.dot(numbers_of_int8(q, dtype, ASM), values, input_precision="ieee") * scale
        else:
            total = tl.dot((float_of_int8(q) * scale).to(dtype), values, total, input_precision="ieee")
    return total


@triton.jit
def weight_products(
    x, data, scales, row, b_mask, begin,
    K: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, AFTER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(BN, BB) float32 products of rows ``row`` of the weight and BB rows of x over columns [begin, begin + COLUMNS).

    ``x`` (1, BB) is where rows of x begin; those that ``b_mask`` leaves out are 0. A step reads BK columns. AFTER:
    scales multiply float32 sums of columns that share one, and what is multiplied are the integers; else they multiply
    the weights, which are then rounded to x's dtype, as `widen_kernel` rounds them. fp8's scale, one of a row,
    multiplies the whole sum. ASM: not in the interpreter.
    """
    total = tl.zeros((BN, BB), tl.float32)
    EVEN: tl.constexpr = K % COLUMNS == 0 and COLUMNS % BK == 0
    for k0 in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        if BITS == 4:
            for part in tl.static_range(BK // 64):
                total = _words_part(
                    total, x, data, scales, begin + k0 + part * 64, row, b_mask, K, GROUP, EVEN, AFTER, ASM
                )
        else:
            SHARED: tl.constexpr = BK if BITS == 1 or BK < GROUP else GROUP
            for part in tl.static_range(BK // SHARED):
                total = _bytes_part(
                    total, x, data, scales, begin + k0 + part * SHARED, row, b_mask, K, BITS, GROUP, SHARED, EVEN,
                    AFTER, ASM,
                )  # fmt: skip
    if BITS == 1:
        total *= tl.load(scales + row)[:, None]
    return total


@triton.jit
def row_products(
    x, data, scales, row, b_mask, begin,
    K: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(BB, BN) float32: what `weight_products` gives, turned. ``x`` (BB, 1) is where rows of x begin.

    The weight is the second operand, which Hopper's products take from shared memory: a thread widens neighbours of a
    row and writes them there. As the first operand they would be a thread's own registers, which hold pairs of columns
    8 apart: twice the instructions a number.
    """
    total = tl.zeros((BB, BN), tl.float32)
    EVEN: tl.constexpr = K % COLUMNS == 0 and COLUMNS % BK == 0
    for k0 in tl.range(0, COLUMNS, BK, num_stages=STAGES):
        k = begin + k0 + tl.arange(0, BK)
        inside = b_mask[:, None] if EVEN else b_mask[:, None] & (k < K)[None, :]
        values = tl.load(x + k[None, :], mask=inside, other=0.0)
        w = weight_tile(
            data, scales, row, begin + k0, x.dtype.element_ty, K, BITS, GROUP, BN, BK, EVEN, False, ASM
        )  # fmt: skip
        total = tl.dot(values, w.T, total, input_precision="ieee")
    if BITS == 1:
        total *= tl.load(scales + row)[None, :]
    return total


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, data, scales, bias, y, rows, stride_x,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    AFTER: tl.constexpr, ROWS_FIRST: tl.constexpr, ASM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x weight^T of BN rows of the weight and BB rows of x, over COLUMNS columns: one split of K.

    y is (rows, N) in x's dtype with one split, else (SPLITS, rows, N) float32, which `sum_kernel` adds. ROWS_FIRST:
    x is the first operand of the products, and not the weight.
    """
    blocks = (rows + BB - 1) // BB
    b = tl.program_id(0) % blocks * BB + tl.arange(0, BB)  # programs of one weight tile follow each other
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    row, b_mask = tl.minimum(n, N - 1), b < rows
    if ROWS_FIRST:
        total = row_products(
            x + b[:, None].to(tl.int64) * stride_x, data, scales, row, b_mask, split * COLUMNS,
            K, COLUMNS, BITS, GROUP, BN, BB, BK, STAGES, ASM,
        )  # fmt: skip
        if SPLITS == 1 and HAS_BIAS:
            total += tl.load(bias + row).to(tl.float32)[None, :]
        turned = y + (split * rows + b[:, None].to(tl.int64)) * N + n[None, :]
        tl.store(turned, total.to(y.dtype.element_ty), mask=(n < N)[None, :] & b_mask[:, None])
    else:
        total = weight_products(
            x + b[None, :].to(tl.int64) * stride_x, data, scales, row, b_mask, split * COLUMNS,
            K, COLUMNS, BITS, GROUP, BN, BB, BK, STAGES, AFTER, ASM,
        )  # fmt: skip
        if SPLITS == 1 and HAS_BIAS:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        place = y + (split * rows + b[None, :].to(tl.int64)) * N + n[:, None]
        tl.store(place, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & b_mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    parts, bias, y, rows, N: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """y (rows, N) from the partial sums (SPLITS, rows, N) float32, added in their order."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + b) * N + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + b * N + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def widen_kernel(
    data, scales, y, first,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """y (rows, K): rows of the weight from ``first`` on, in y's dtype, which are rounded once."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)  # rows of y
    row = tl.minimum(first + i, N - 1)
    begin = tl.program_id(1) * BK
    k = begin + tl.arange(0, BK)
    dtype: tl.constexpr = y.dtype.element_ty
    EVEN: tl.constexpr = K % BK == 0
    w = weight_tile(data, scales, row, begin, dtype, K, BITS, GROUP, BN, BK, EVEN, True, ASM)
    if BITS == 1:
        w = (w.to(tl.float32) * tl.load(scales + row)[:, None]).to(dtype)
    inside = (first + i < N)[:, None]
    place = y + i[:, None].to(tl.int64) * K + k[None, :]
    tl.store(place, w, mask=inside if EVEN else inside & (k < K)[None, :])


@triton.jit
def float8_kernel(x, q, scales, stride_x, K: tl.constexpr, SIZE: tl.constexpr):
    """q (rows, K) and scales (rows,): the rows of x in float8."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SIZE)
    values = tl.load(x + b * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    found, scale = row_in_float8(values)
    tl.store(q + b * K + k, found, mask=k < K)
    tl.store(scales + b, scale)


@triton.jit
def norm_float8_kernel(
    x, weight, residual, kept, q, scales, stride_x, stride_r, eps,
    H: tl.constexpr, SIZE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """kept (rows, H): x, or x and the residual's sum; q (rows, H), scales (rows,): its RMS norm in float8.

    ROUNDED: the norm is first rounded to bfloat16 (1) or float16 (2), as a norm that writes it rounds it; 0: not.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    mask = i < H
    total = tl.load(x + b * stride_x + i, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + b * stride_r + i, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(kept.dtype.element_ty)
    tl.store(kept + b * H + i, rounded, mask=mask)
    total = rounded.to(tl.float32)
    y = total * tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    y *= tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    if ROUNDED == 1:
        y = y.to(tl.bfloat16).to(tl.float32)
    elif ROUNDED == 2:
        y = y.to(tl.float16).to(tl.float32)
    found, scale = row_in_float8(y)
    tl.store(q + b * H + i, found, mask=mask)
    tl.store(scales + b, scale)
