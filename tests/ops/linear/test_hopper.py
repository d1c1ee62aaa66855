"""The Hopper kernel of packed products: compiled everywhere, and on a Hopper against float64."""

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mambakit.ops.linear import hopper_kernels as kernels
from mambakit.ops.linear import triton as gpu
from mambakit.ops.linear import triton_plan as plans
from mambakit.ops.linear.packed import dequantize
from tests.ops.closeness import relative_error
from tests.ops.interpreter import INTERPRETED
from tests.ops.linear.test_triton import BF16, BOUNDS, F16, F32, call, exact, packed_of, rows_of

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_a_hopper = pytest.mark.skipif(not HOPPER or INTERPRETED, reason="no Hopper here")
FORMATS = ["int8", "int4"]
TILES = [
    tile for tile in dict.fromkeys(tile for table in plans.HOPPER_PRODUCTS.values() for _, tile in table) if tile.hopper
]


@on_a_hopper
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 64), (40, 64), (130, 208), (300, 1104)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_product(format, group, shape, tile):
    """Odd numbers of rows and of columns, with whole sums and with split ones."""
    weight = packed_of(*shape, format, group, "cuda")
    for dtype, rows, waves in ((BF16, 3, 1), (F16, tile.BB + 1, 1), (BF16, tile.BB + 5, 0), (F16, 2, 2)):
        x, bias = rows_of(rows, shape[1], dtype, "cuda"), rows_of(1, shape[0], F32, "cuda")[0]
        plan = dataclasses.replace(tile, waves=waves).fitting(format, group, 2, gpu.card_of(x)[1] - gpu.KEPT)
        for b in (None, bias):
            y = gpu.in_registers(x, weight, b, plan)
            assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
            assert relative_error(y, exact(x, weight, b)) < BOUNDS[dtype]


@on_a_hopper
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_tma_cannot_read(format):
    """An odd stride, an odd place in memory, and columns that fill no 16 bytes."""
    weight = packed_of(200, 128, format, 64, "cuda")
    wide = rows_of(70, 131, BF16, "cuda")
    for x in (wide[:, :128], wide[:, 3:], wide.T[:128].T):
        assert relative_error(call(x, weight), exact(x, weight)) < BOUNDS[BF16]
    odd = packed_of(200, 131, format, 64, "cuda")
    assert not gpu.takes_hopper(wide, odd)
    assert relative_error(call(wide, odd), exact(wide, odd)) < BOUNDS[BF16]


@on_a_hopper
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_fault_in_x_shows(format, fault):
    weight = packed_of(200, 128, format, 64, "cuda")
    x = rows_of(40, 128, BF16, "cuda")
    x[1, 50] = fault
    y = call(x, weight)
    assert not y[1, 2:].isfinite().any()
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()


@on_a_hopper
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_bits_as_widened(format):
    """One row of x that picks a column: what is multiplied is the widened weight, but for a neighbour in 1,400."""
    weight = packed_of(300, 256, format, 64, "cuda")
    eye = torch.eye(256, dtype=BF16, device="cuda")
    picked = gpu.in_registers(eye, weight, None, TILES[-1].fitting(format, 64, 2, 200 << 10)).T
    assert (picked != dequantize(weight).to(BF16)).double().mean() < 2e-3
    assert relative_error(picked, dequantize(weight)) < 3e-3


def compiled(format: str, tile: plans.Product, partial: bool) -> tuple[int, int, str]:
    """For a Hopper, which need not be here: (bytes of shared memory, bytes of a thread's stack, machine code)."""
    kernel, bits = kernels.wide_product_kernel, plans.BITS[format]
    rows, words = [tile.BB, tile.BK], [tile.BN, tile.BK * bits // 16]
    layouts = [gl.NVMMASharedLayout.get_default_for(*block) for block in ((rows, gl.bfloat16), (words, gl.int16))]
    types = {
        "x": f"tensordesc<bf16{rows},{layouts[0]!r}>", "data": f"tensordesc<i16{words},{layouts[1]!r}>",
        "scales": "*fp32", "y": "*fp32" if partial else "*bf16",
    }  # fmt: skip
    constants = gpu.wide_constants(tile, bits, 64, partial, False) | {"bias": None}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in ("scales", "y", "N")}
    source = GluonASTSource(kernel, signature, constexprs=places, attrs=attributes)
    options = {"num_warps": tile.warps, "maxnreg": tile.registers}
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [tools / "nvdisasm", "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack, usage
    return found.metadata.shared, int(stack[1]), code


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_tables_tiles_compile(format, tile):
    """They fit a Hopper's shared memory and registers, and one product runs while the next is issued."""
    tile = tile.fitting(format, 64, 2, (227 << 10) - gpu.KEPT)
    for partial in (False, True)[: 1 if tile.BB == 256 else 2]:  # `spread` leaves so large a tile whole sums
        shared, stack, code = compiled(format, tile, partial)
        assert shared <= 227 << 10
        assert stack == 0
        parts = tile.BK // 16
        assert code.count("HGMMA.") == parts * tile.BN // 16 // tile.warps
        assert code.count("DEPBAR.LE gsb0, 0x1") == parts - 1, "ptxas made one wait for the other"


def test_the_table():
    for format in FORMATS:
        for rows in (1, 16, 17, 64, 65, 300, plans.HOPPER_PRODUCTS[format][-1][0]):
            for group in (32, 64, 128):
                plan = plans.product_of(format, BF16, group, rows, (227 << 10) - gpu.KEPT, hopper=True)
                assert plan is not None
                plan = plan.spread(rows, 4096, 8192, 132)
                assert plan.shared_bytes(format, 2) <= (227 << 10) - gpu.KEPT
                splits, columns = plan.splits(rows, 4096, 8192, 132)
                assert columns % plan.BK == 0
                assert (splits - 1) * columns < 8192 <= splits * columns
        for n, k in ((16384, 4096), (4096, 8192), (8192, 2048), (2048, 4096)):
            for rows in (129, 256, 400, 512, 1024):
                tile = plans.HOPPER_PRODUCTS["int4"][-1][1].spread(rows, n, k, 132)
                assert tile.BB < 256 or tile.splits(rows, n, k, 132)[0] == 1
        few = plans.product_of(format, BF16, 64, 16, 99 << 10)
        assert few is not None
        assert not few.hopper
