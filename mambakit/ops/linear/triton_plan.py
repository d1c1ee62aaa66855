"""Which product of a packed weight serves which number of rows on a GPU, and how it is tiled: the one table of it.

Three ways, by the rows of x. Few: `product_kernel` widens the weight in registers, so that its packed bits are read
once from memory; on a Hopper `hopper_kernels.py` does so for more rows of int8 and int4, while tensor cores multiply.
Many, of int8 and int4: `widen_kernel` writes the weight in x's dtype, and cuBLAS multiplies. Many, of fp8: the rows of
x become float8, and the tensor cores multiply 8-bit numbers. `benchmarks/packed_products.py` times
every way and every tile of `CANDIDATES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BITS = {"int8": 8, "int4": 4, "fp8": 1}  # as kernels name the formats
_LEAST_COLUMNS, _MOST_SPLITS = 256, 32  # columns of a split of K, and splits


@dataclass(frozen=True)
class Product:
    """A tile of `product_kernel`: BN rows of the weight and BB rows of x, BK columns in a step.

    ``waves``: programs for each multiprocessor that splitting K aims at. ``after``: scales multiply sums, not weights.
    ``rows_first``: x is the first operand, of 64 rows or more; the weight is widened into shared memory.
    ``hopper``: by `hopper_kernels.wide_product_kernel`, 16 or 32 rows of the weight for each warp, BK a multiple of 64,
    three stages or more.
    """

    BN: int
    BB: int
    BK: int
    warps: int
    stages: int
    waves: int = 2
    after: bool = False
    rows_first: bool = False
    hopper: bool = False

    @property
    def registers(self) -> int | None:
        """Of a thread at the most, so that several CTAs fit a multiprocessor."""
        return (80 if self.BB <= 64 else 128) if self.hopper and self.warps == 4 and self.BB <= 128 else None

    def fitting(self, format: str, group: int, itemsize: int, shared: int) -> Product:
        """With steps of whole units, and with fewer stages, columns and rows of x until they fit ``shared`` bytes."""
        unit = 64 if format == "int4" or self.hopper else 16
        plan = replace(self, BK=max(self.BK, unit))
        if format == "int8" and group < plan.BK and not plan.rows_first and not plan.hopper:
            plan = replace(plan, BK=plan.BK // group * group)
        while plan.shared_bytes(format, itemsize) > shared:
            if plan.stages > (3 if plan.hopper else 2):
                plan = replace(plan, stages=plan.stages - 1)
            elif plan.BK >= 128:
                plan = replace(plan, BK=plan.BK // 2)
            elif plan.BB > 16:
                plan = replace(plan, BB=plan.BB // 2)
            else:
                return replace(plan, stages=1)
        return plan

    def shared_bytes(self, format: str, itemsize: int) -> int:
        weights = self.BN * self.BK // (2 if format == "int4" else 1)
        step = weights + self.BB * self.BK * itemsize + self.BN * 8  # a scale or two of each row
        widened = self.BN * self.BK * itemsize if self.rows_first else 0
        if self.hopper:
            return self.stages * (step + 8)
        return max(self.stages * step + widened, self.BN * self.BB * 4)  # what is stored is turned in shared memory

    def spread(self, rows: int, n: int, k: int, processors: int) -> Product:
        """With fewer rows of a weight that has few (x_proj), while all splits of K leave half of the card idle.

        On a Hopper a tile of 256 rows of x, one for each multiprocessor, becomes quarters of it, two for each, where
        there are too few.
        """
        if self.hopper:
            few = -(-n // self.BN) * -(-rows // self.BB) < processors * 3 // 4
            return QUARTER if few and self.BB == 256 else self
        plan = self
        while plan.BN > 32:
            programs = -(-n // plan.BN) * -(-rows // plan.BB) * max(1, min(k // _LEAST_COLUMNS, _MOST_SPLITS))
            if 2 * programs > processors:
                break
            plan = replace(plan, BN=plan.BN // 2)
        return plan

    def splits(self, rows: int, n: int, k: int, processors: int) -> tuple[int, int]:
        """(splits of K, columns of each): as many programs as fill the card, of at least 256 columns each. More than
        one for each multiprocessor only while their sums, written and read, are no more bytes than an int8 weight."""
        programs = -(-n // self.BN) * -(-rows // self.BB)
        wanted = max(1, min(self.waves * processors // programs, k // _LEAST_COLUMNS, _MOST_SPLITS))
        wanted = min(wanted, max(k // (8 * rows), processors // programs, 1))
        columns = -(-k // (wanted * self.BK)) * self.BK
        return -(-k // columns), columns


# Rows of x up to which weights are widened in registers, by format. Of the largest tile's number of rows.
MOST_IN_REGISTERS = {"int8": 512, "int4": 512, "fp8": 32}
# float32 x has no tensor cores here (products are exact): few rows only, for which reading the weight is the time.
MOST_IN_FLOAT32 = 16

# By format, then by rows up to which a tile serves. Two warps: Triton then multiplies by mma.sync, whose operands both
# are registers in an order of columns that suits bytes; four would take wgmma, with twice the instructions a number.
_FEW, _SOME = Product(64, 16, 128, 2, 4, waves=4, after=True), Product(64, 32, 128, 2, 4, waves=4, after=True)
_MORE, _MANY = Product(128, 64, 128, 8, 3, rows_first=True), Product(128, 128, 128, 8, 3, waves=1, rows_first=True)
_MOST = Product(128, 256, 64, 8, 3, waves=1, rows_first=True)
PRODUCTS: dict[str, tuple[tuple[int, Product], ...]] = {
    "int8": (
        (16, Product(64, 16, 256, 2, 3, waves=1, after=True)),
        (32, replace(_SOME, stages=3)),
        (64, _MORE),
        (128, _MANY),
        (1 << 30, _MOST),
    ),
    "int4": ((16, replace(_FEW, waves=1)), (32, _SOME), (64, _MORE), (128, _MANY), (1 << 30, _MOST)),
    "fp8": (
        (16, replace(_FEW, after=False)),
        (32, replace(_SOME, after=False)),
        (64, _MORE),
        (1 << 30, _MANY),
    ),
}
FLOAT32_PRODUCT = Product(32, 16, 32, 4, 2)
# On a Hopper, of int8 and int4 in a half dtype; more rows have the weight widened in memory.
QUARTER = Product(64, 128, 128, 4, 3, waves=1, hopper=True)
_WIDE = Product(128, 256, 64, 8, 4, waves=1, hopper=True)
HOPPER_PRODUCTS: dict[str, tuple[tuple[int, Product], ...]] = {
    "int8": (
        (16, Product(64, 16, 256, 4, 3, hopper=True)),
        (32, Product(64, 32, 128, 4, 4, hopper=True)),
        (64, Product(64, 64, 128, 4, 4, hopper=True)),
        (128, QUARTER),
        (512, _WIDE),
    ),
    "int4": (
        (16, Product(64, 16, 256, 4, 3, hopper=True)),
        (32, Product(64, 32, 256, 4, 3, hopper=True)),
        (64, Product(64, 64, 128, 4, 4, hopper=True)),
        (128, QUARTER),
        (1024, _WIDE),
    ),
}
# With more rows than the first, a weight of no more bytes than the second once it is widened is widened in memory: it
# stays in the L2 cache (50 MB of an H100's) until the product reads it. Prompts of 512 tokens of 1.4b on an H200: int8
# 7.7 ms for 8.9 in registers, int4 8.4 for 8.6, bfloat16 6.9 to 7.6.
MOST_BEFORE_CACHE, CACHED = 256, 40 << 20
# More rows of int8 and int4: bytes of widened weight that are written and multiplied at a time, by rows up to which; 0:
# the whole weight. A slab that stays in the L2 cache is not read from memory again; fewer rows need larger slabs to
# fill the card.
SLABS_BY_ROWS: tuple[tuple[int, int], ...] = ((4096, 0), (1 << 30, 16 << 20))

# What the benchmark tries beside them, for up to BB rows. Of the fastest ones it then tries other numbers of waves.
# Where `after` keeps two sums of a tile, a thread's share of it is small: others would spill.
_WEIGHT_FIRST = (
    (16, ((64, 2), (32, 2), (32, 4), (64, 4)), ((128, 4), (128, 3), (256, 3))),
    (32, ((64, 2), (128, 2), (32, 2), (64, 4)), ((128, 3), (128, 4), (64, 4))),
    (64, ((64, 4), (128, 8)), ((64, 4),)),
    (128, ((128, 8),), ((64, 3),)),
    (256, ((128, 8),), ((64, 3),)),
)
_ROWS_FIRST = (
    (64, ((64, 4), (128, 4), (128, 8)), ((64, 4), (128, 3), (128, 4))),
    (128, ((64, 4), (128, 8), (256, 8)), ((64, 3), (64, 4), (128, 3))),
    (256, ((128, 8),), ((64, 3), (128, 2))),
)
_HOPPER = (
    (64, 16, 256, 4, 3), (64, 16, 128, 4, 4), (64, 32, 256, 4, 3), (64, 32, 128, 4, 4), (64, 64, 128, 4, 4),
    (128, 64, 128, 8, 4), (64, 128, 128, 4, 3), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3), (256, 128, 64, 8, 4),
    (128, 256, 64, 8, 4),
)  # fmt: skip
CANDIDATES: tuple[Product, ...] = (
    tuple(
        Product(bn, bb, bk, warps, stages, after=after)
        for bb, rows_of_weight, steps in _WEIGHT_FIRST
        for bn, warps in rows_of_weight
        for bk, stages in steps
        for after in (True, False)
        if not (after and bn * bb > 32 * 32 * warps)
    )
    + tuple(
        Product(bn, bb, bk, warps, stages, rows_first=True)
        for bb, rows_of_weight, steps in _ROWS_FIRST
        for bn, warps in rows_of_weight
        for bk, stages in steps
    )
    + tuple(Product(*tile, hopper=True) for tile in _HOPPER)
)
WAVES = (1, 2, 4)
SLABS = (0, 8 << 20, 16 << 20, 32 << 20)

# float8 products of x's rows: below these sizes of the weight the rows' float8 costs more than it saves, and x_proj's
# time steps, B and C keep x's precision.
LEAST_FLOAT8 = 512
FLOAT8_CAPABILITY = (8, 9)


def tile_of(format: str, rows: int) -> Product:
    """The table's tile for so many rows of a half dtype."""
    return next(product for most, product in PRODUCTS[format] if rows <= most)


def product_of(
    format: str, dtype: torch.dtype, group: int, rows: int, shared: int, hopper: bool = False, widened: int = 0
) -> Product | None:
    """The tile that multiplies ``rows`` rows with the weight in registers; None where another way does.

    ``hopper``: as `takes_hopper` says. ``widened``: bytes of the weight in x's dtype, 0 for many.
    """
    if dtype == torch.float32:
        chosen = FLOAT32_PRODUCT if rows <= MOST_IN_FLOAT32 else None
    elif hopper and format in HOPPER_PRODUCTS and 0 < widened <= CACHED and rows > MOST_BEFORE_CACHE:
        chosen = None
    elif hopper and format in HOPPER_PRODUCTS:
        chosen = next((product for most, product in HOPPER_PRODUCTS[format] if rows <= most), None)
    elif rows > MOST_IN_REGISTERS[format]:
        chosen = None
    else:
        chosen = tile_of(format, rows)
    return None if chosen is None else chosen.fitting(format, group, dtype.itemsize, shared)


def slab_of(rows: int) -> int:
    """Bytes of widened weight at a time; 0: all of it."""
    return next(slab for most, slab in SLABS_BY_ROWS if rows <= most)


def slabs(n: int, k: int, itemsize: int, slab: int) -> list[tuple[int, int]]:
    """(first row, rows) of the parts of a weight (n, k) that are widened to ``itemsize`` bytes a number and multiplied
    one after the other, ``slab`` bytes at a time (0: all)."""
    step = n if not slab else min(n, max(128, slab // (k * itemsize) // 128 * 128))
    return [(first, min(step, n - first)) for first in range(0, n, step)]


def takes_hopper(
    capability: tuple[int, int], dtype: torch.dtype, format: str, row_bytes: int, in_features: int
) -> bool:
    """Whether `hopper_kernels.wide_product_kernel` serves a weight: on a Hopper, in half precision, with rows that TMA
    can read, which also begin at a multiple of 16 bytes."""
    return (
        capability[0] == 9 and dtype.itemsize == 2 and format in HOPPER_PRODUCTS
        and row_bytes % 16 == 0 and in_features % 8 == 0
    )  # fmt: skip


def takes_float8(dtype: torch.dtype, rows: int, out_features: int, in_features: int) -> bool:
    """Whether the rows of x are rounded to float8 for a product with fp8 weights."""
    return (
        dtype.itemsize == 2 and rows > MOST_IN_REGISTERS["fp8"] and min(out_features, in_features) >= LEAST_FLOAT8
        and out_features % 16 == 0 and in_features % 16 == 0
    )  # fmt: skip
