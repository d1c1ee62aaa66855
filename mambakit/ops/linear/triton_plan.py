"""Which product of a packed weight serves which number of rows on a GPU, and how it is tiled: the one table of it.

Three ways, by the rows of x. Few: `product_kernel` widens the weight in registers, so that its packed bits are read
once from memory. Many, of int8 and int4: `widen_kernel` writes the weight in x's dtype, and cuBLAS multiplies. Many, of
fp8: the rows of x become float8, and the tensor cores multiply 8-bit numbers. `benchmarks/packed_products.py` times
every way and every tile of `CANDIDATES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BITS = {"int8": 8, "int4": 4, "fp8": 1}  # as kernels name the formats
_LEAST_COLUMNS = 256  # of a split of K


@dataclass(frozen=True)
class Product:
    """A tile of `product_kernel`: BN rows of the weight and BB rows of x, BK columns in a step.

    ``waves``: programs for each multiprocessor that splitting K aims at. ``after``: scales multiply sums, not weights.
    """

    BN: int
    BB: int
    BK: int
    warps: int
    stages: int
    waves: int = 2
    after: bool = False

    def fitting(self, format: str, group: int, itemsize: int, shared: int) -> Product:
        """With steps of whole units, and with fewer rows of x and fewer stages until they fit ``shared`` bytes."""
        unit = 64 if format == "int4" else 16
        plan = replace(self, BK=max(self.BK, unit))
        if format == "int8" and group < plan.BK:
            plan = replace(plan, BK=plan.BK // group * group)
        while shared < plan.BN * plan.BB * 4 and plan.BB > 16:
            plan = replace(plan, BB=plan.BB // 2)
        while plan.stages > 1 and plan.shared_bytes(format, itemsize) > shared:
            plan = replace(plan, stages=plan.stages - 1)
        return plan

    def shared_bytes(self, format: str, itemsize: int) -> int:
        weights = self.BN * self.BK // (2 if format == "int4" else 1)
        stages = self.stages * (weights + self.BB * self.BK * itemsize + self.BN * 8)  # a scale or two of each row
        return max(stages, self.BN * self.BB * 4)  # what is stored is turned in shared memory

    def splits(self, rows: int, n: int, k: int, processors: int) -> tuple[int, int]:
        """(splits of K, columns of each): as many programs as fill the card, of at least 256 columns each."""
        programs = -(-n // self.BN) * -(-rows // self.BB)
        wanted = max(1, min(self.waves * processors // programs, k // _LEAST_COLUMNS, 32))
        columns = -(-k // (wanted * self.BK)) * self.BK
        return -(-k // columns), columns


# Rows of x up to which weights are widened in registers, by format. Of the largest tile's number of rows.
MOST_IN_REGISTERS = {"int8": 512, "int4": 512, "fp8": 32}
# float32 x has no tensor cores here (products are exact): few rows only, for which reading the weight is the time.
MOST_IN_FLOAT32 = 16

# By format, then by rows up to which a tile serves.
PRODUCTS: dict[str, tuple[tuple[int, Product], ...]] = {
    "int8": (
        (16, Product(64, 16, 128, 4, 4, after=True)),
        (32, Product(64, 32, 128, 4, 4, after=True)),
        (64, Product(64, 64, 64, 4, 4)),
        (128, Product(128, 128, 64, 8, 4)),
        (1 << 30, Product(128, 256, 64, 8, 3, waves=1)),
    ),
    "int4": (
        (16, Product(64, 16, 128, 4, 4, after=True)),
        (32, Product(64, 32, 128, 4, 4, after=True)),
        (64, Product(64, 64, 64, 4, 4)),
        (128, Product(128, 128, 64, 8, 3)),
        (1 << 30, Product(128, 256, 64, 8, 3, waves=1)),
    ),
    "fp8": (
        (16, Product(64, 16, 128, 4, 4)),
        (32, Product(64, 32, 128, 4, 4)),
        (64, Product(64, 64, 64, 4, 4)),
        (1 << 30, Product(128, 128, 64, 8, 4)),
    ),
}
FLOAT32_PRODUCT = Product(32, 16, 32, 4, 2)
# More rows of int8 and int4: bytes of widened weight that are written and multiplied at a time, by rows up to which; 0:
# the whole weight. A slab that stays in the L2 cache is not read from memory again; fewer rows need larger slabs to
# fill the card.
SLABS_BY_ROWS: tuple[tuple[int, int], ...] = ((1024, 32 << 20), (1 << 30, 16 << 20))

# What the benchmark tries beside them, for up to BB rows. Of the fastest ones it then tries other numbers of waves.
# Where `after` keeps two sums of a tile, a thread's share of it is small: others would spill.
CANDIDATES: tuple[Product, ...] = tuple(
    Product(bn, bb, bk, warps, stages, after=after)
    for bb, rows_of_weight, steps in (
        (16, ((32, 4), (64, 4), (128, 4)), ((64, 4), (128, 3), (128, 5), (256, 3))),
        (32, ((32, 4), (64, 4), (128, 4)), ((64, 4), (128, 3), (128, 5), (256, 3))),
        (64, ((64, 4), (128, 4), (128, 8)), ((64, 4), (128, 3))),
        (128, ((128, 4), (128, 8), (256, 8)), ((64, 3), (64, 4), (128, 3))),
        (256, ((128, 8),), ((64, 3), (64, 4), (128, 2))),
    )
    for bn, warps in rows_of_weight
    for bk, stages in steps
    for after in (True, False)
    if not (after and bn * bb > 32 * 32 * warps)
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


def product_of(format: str, dtype: torch.dtype, group: int, rows: int, shared: int) -> Product | None:
    """The tile that multiplies ``rows`` rows with the weight in registers; None where another way does."""
    if dtype == torch.float32:
        chosen = FLOAT32_PRODUCT if rows <= MOST_IN_FLOAT32 else None
    elif rows > MOST_IN_REGISTERS[format]:
        chosen = None
    else:
        chosen = tile_of(format, rows)
    return None if chosen is None else chosen.fitting(format, group, dtype.itemsize, shared)


def slab_of(rows: int) -> int:
    """Bytes of widened weight at a time; 0: all of it."""
    return next(slab for most, slab in SLABS_BY_ROWS if rows <= most)


def takes_float8(dtype: torch.dtype, rows: int, out_features: int, in_features: int) -> bool:
    """Whether the rows of x are rounded to float8 for a product with fp8 weights."""
    return (
        dtype.itemsize == 2 and rows > MOST_IN_REGISTERS["fp8"] and min(out_features, in_features) >= LEAST_FLOAT8
        and out_features % 16 == 0 and in_features % 16 == 0
    )  # fmt: skip
