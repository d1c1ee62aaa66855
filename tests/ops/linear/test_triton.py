"""Packed weights on a GPU, or in Triton's interpreter, against float64; and the kernels compiled for Hopper."""

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
from triton.compiler import ASTSource

from mambakit.ops.linear import pack, reference
from mambakit.ops.linear import triton as gpu
from mambakit.ops.linear import triton_kernels as kernels
from mambakit.ops.linear import triton_plan as plans
from mambakit.ops.linear.packed import SCALED, PackedWeight, dequantize, to_float8
from mambakit.ops.linear.schema import parts_of
from mambakit.ops.linear.triton_plan import Product
from mambakit.ops.rms_norm.reference import rms_norm
from tests.ops.closeness import relative_error
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Rounding of y, and of what is multiplied; the interpreter truncates to bfloat16.
BOUNDS = {F32: 2e-6, BF16: 8e-3 if INTERPRETED else 4e-3, F16: 1.5e-3 if INTERPRETED else 8e-4}
HALF = F16 if INTERPRETED else BF16  # the interpreter multiplies bfloat16's bits as if they were integers
TILES = {
    "small": Product(16, 16, 64, 4, 2),
    "after": Product(32, 16, 128, 4, 3, after=True),
    "two blocks of rows": Product(16, 16, 64, 4, 2, waves=1),
    "split": Product(16, 32, 32, 4, 2, waves=4),
    "rows first": Product(32, 64, 128, 4, 2, rows_first=True),
    "rows first, split": Product(16, 64, 64, 4, 2, waves=4, rows_first=True),
}


def packed_of(out: int, columns: int, format: str, group: int, device: str) -> PackedWeight:
    generator = torch.Generator().manual_seed(out + columns)
    weight = torch.randn(out, columns, generator=generator)
    weight[0] *= torch.logspace(-4, 1, columns)
    weight[min(1, out - 1)] = 0
    weight = pack(weight, format, group)
    return dataclasses.replace(weight, data=weight.data.to(device), scales=weight.scales.to(device))


def rows_of(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator).to(dtype).to(device)


def exact(x, weight, bias=None):
    y = x.double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.double()


def call(x, weight, bias=None):
    return gpu.linear(x, *parts_of(weight), bias, weight.format, weight.in_features, weight.group)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() and memory.itemsize > 1 else memory

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def small_table(monkeypatch):
    """Few rows are few enough for the interpreter."""
    monkeypatch.setattr(plans, "LEAST_FLOAT8", 48)
    monkeypatch.setattr(plans, "MOST_IN_REGISTERS", {"int8": 64, "int4": 64, "fp8": 32})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1), (40, 64), (33, 200), (50, 640), (7, 1000)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 35])
def test_a_product_in_registers(device, tile, format, group, shape, rows):
    one_of = {"small": (33, 200, 5), "after": (33, 200, 5), "two blocks of rows": (7, 1000, 35), "split": (1, 1, 1)}
    one_of |= {"rows first": (33, 200, 5), "rows first, split": (7, 1000, 35)}
    if INTERPRETED and (*shape, rows) != one_of[tile]:
        pytest.skip("slow in the interpreter")
    if format == "fp8" and group != 64:
        pytest.skip("one scale of a row")
    weight = packed_of(*shape, format, group, device)
    for dtype, bias in ((F32, None), (HALF, rows_of(1, shape[0], F32, device)[0])):
        x = rows_of(rows, shape[1], dtype, device)
        plan = TILES[tile].fitting(format, group, dtype.itemsize, 200 << 10)
        y = gpu.in_registers(x, weight, bias, plan)
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        assert relative_error(y, exact(x, weight, bias)) < BOUNDS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1), (33, 200), (50, 640), (300, 72)], ids=str)
def test_widening(device, format, group, shape):
    if INTERPRETED and (group == 64) != (shape == (33, 200)):
        pytest.skip("slow in the interpreter")
    weight = packed_of(*shape, format, group, device)
    assert torch.equal(gpu.dequantize(*parts_of(weight), format, shape[1], group), dequantize(weight))
    assert relative_error(dequantize(weight), reference.numbers(weight)) < 1e-7
    for dtype in (BF16, F16):
        half = torch.full((shape[0], shape[1]), torch.nan, dtype=dtype, device=device)
        gpu.widen_into(half, weight)
        if INTERPRETED:  # it truncates
            assert relative_error(half, dequantize(weight)) < BOUNDS[dtype]
        else:
            assert torch.equal(half, dequantize(weight).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("rows", [1, 16, 40, 100])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_every_number_of_rows(device, format, rows, dtype, small_table, monkeypatch):
    """The table's own choices; 100 rows widen, in slabs, too, and of fp8 become float8."""
    if INTERPRETED and dtype == BF16 and rows <= plans.MOST_IN_REGISTERS[format]:
        pytest.skip("see HALF")
    n, k = (144, 64) if INTERPRETED else (528, 512)
    weight = packed_of(n, k, format, 64, device)
    x, bias = rows_of(rows, k, dtype, device), rows_of(1, n, dtype, device)[0]
    # fp8: a uniform relative error of 2^-4 at most in each number of x.
    rounded = format == "fp8" and plans.takes_float8(dtype, rows, n, k)
    assert rounded == (format == "fp8" and rows > 32 and dtype != F32)
    bound = 4e-2 if rounded else BOUNDS[dtype]
    y = call(x, weight, bias)
    assert y.dtype == dtype
    assert relative_error(y, exact(x, weight, bias)) < bound
    assert relative_error(call(x.view(1, rows, k), weight)[0], exact(x, weight)) < bound
    turned = rows_of(k, rows, dtype, device).T
    assert relative_error(call(turned, weight), exact(turned, weight)) < bound
    monkeypatch.setattr(plans, "SLABS_BY_ROWS", ((1 << 30, 128 * k * dtype.itemsize),))
    assert relative_error(call(x, weight, bias), exact(x, weight, bias)) < bound
    if rounded:  # exactly the product of the rows' float8
        q, scales = to_float8(x)
        assert relative_error(call(x, weight), exact(q.double() * scales.double(), weight)) < BOUNDS[BF16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["bfloat16", "lossless16", "float32", "lossless32"])
def test_formats_without_kernels(device, format):
    weight = torch.randn(40, 200).to(BF16 if format in ("bfloat16", "lossless16") else F32)
    weight = pack(weight.to(device), format)
    for rows in (3, 50):
        for dtype in (BF16, F32):
            x = rows_of(rows, 200, dtype, device)
            assert relative_error(call(x, weight), exact(x, weight)) < BOUNDS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 60, 513])
def test_rows_in_float8(device, columns):
    """The bits of PyTorch's conversion: every exponent, subnormal numbers, ties, both zeros."""
    x = rows_of(64, columns, F32, device) * torch.logspace(-8, 8, 64, device=device)[:, None]
    if columns > 500:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[values.isfinite()].sort().values
        x[0] = 0
        x[1, : len(values)], x[1, len(values)] = values.to(device), 448
        ties = (values[1:] + values[:-1]) / 2
        x[2, : len(ties)], x[2, len(ties) :] = ties.to(device), 448
    q, scales = gpu.rows_in_float8(x)
    want, want_scales = to_float8(x)
    assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales, want_scales)
    for fault in (torch.nan, torch.inf):
        x[3, 0] = fault
        q, scales = gpu.rows_in_float8(x)
        assert (q[3].float() * scales[3]).isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 40, 112)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_norm_and_its_product(device, residual, shape, dtype, small_table):
    if INTERPRETED and dtype == BF16 and shape[1] == 5:
        pytest.skip("see HALF")
    h = shape[-1]
    weight = packed_of(96, h, "fp8", 64, device)
    x, norm = rows_of(shape[0] * shape[1], h, dtype, device).view(shape), rows_of(1, h, F32, device)[0]
    before = 3 * rows_of(shape[0] * shape[1], h, F32, device).view(shape) + 1 if residual else None
    bias = rows_of(1, 96, dtype, device)[0]
    y, kept = gpu.normed_linear(x, norm, before, 1e-5, F32, dtype, *parts_of(weight), bias, "fp8", h, 64)
    want_y, want_kept = rms_norm(x, norm, 1e-5, before)
    assert relative_error(kept, want_kept) < 1e-6
    assert (y.shape, y.dtype, kept.dtype) == ((*shape[:-1], 96), dtype, F32)
    fused = plans.takes_float8(dtype, shape[0] * shape[1], 96, h)
    assert fused == (shape[1] == 40)
    assert relative_error(y.flatten(0, 1), exact(want_y.flatten(0, 1), weight, bias)) < (4e-2 if fused else 8e-3)
    if fused:  # exactly the float8 of the norm that is rounded to x's dtype
        q, scales, _ = gpu.norm_in_float8(x, norm, before, 1e-5, F32, dtype)
        alone, _ = gpu.rms_norm(x, norm, before, 1e-5, F32, dtype)
        again, again_scales = gpu.rows_in_float8(alone.flatten(0, 1))
        assert (q.view(torch.uint8) != again.view(torch.uint8)).double().mean() < 1e-3  # sums in another order
        torch.testing.assert_close(scales, again_scales, rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_fault_in_x_shows(device, format, fault, small_table):
    weight = packed_of(80, 64, format, 64, device)
    for rows in (3, 40) if format == "fp8" else (3, 100):
        x = rows_of(rows, 64, HALF, device)
        x[1, 50] = fault
        y = call(x, weight)
        assert not y[1, 2:].isfinite().any()
        assert y[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_multiply(device):
    weight = packed_of(5, 64, "int8", 64, device)
    assert call(torch.empty(0, 64, dtype=BF16, device=device), weight).shape == (0, 5)
    assert call(torch.empty(2, 0, 64, dtype=BF16, device=device), weight).shape == (2, 0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_card_without_8_bit_floats(device, monkeypatch):
    weight = packed_of(16, 64, "fp8", 64, device)
    monkeypatch.setattr(gpu, "card_of", lambda x: (108, 163 << 10, (8, 0)))
    with pytest.raises(ValueError, match=r"compute capability 8.9 .* has 8.0.* int8 .*model.dequantize\(\)"):
        call(rows_of(3, 64, BF16, device), weight)


def test_the_table():
    for format in SCALED:
        for rows in (1, 16, 17, plans.MOST_IN_REGISTERS[format]):
            for shared in (227 << 10, 163 << 10, 99 << 10):
                plan = plans.product_of(format, BF16, 64, rows, shared)
                assert plan.shared_bytes(format, 2) <= shared
                splits, columns = plan.splits(rows, 4096, 8192, 132)
                assert columns % plan.BK == 0
                assert (splits - 1) * columns < 8192 <= splits * columns
        assert plans.product_of(format, BF16, 64, plans.MOST_IN_REGISTERS[format] + 1, 227 << 10) is None
        for rows, widened, hopper in ((257, 40 << 20, False), (256, 1, True), (257, 41 << 20, True), (257, 0, True)):
            there = plans.product_of(format, BF16, 64, rows, 227 << 10, hopper, widened) is not None
            assert there == (format != "fp8"), (rows, widened)
        assert plans.product_of(format, BF16, 64, 257, 227 << 10, True, 40 << 20) is None
    assert Product(64, 16, 256, 4, 4).fitting("int8", 64, 2, 1 << 20).BK == 256
    assert Product(64, 16, 64, 4, 4).fitting("int8", 32, 2, 1 << 20).BK == 64
    assert Product(64, 16, 32, 4, 4).fitting("int4", 64, 2, 1 << 20).BK == 64


def compiled(kernel, constants: dict, types: dict, capability: int, warps: int):
    """The kernel for a card, which need not be here: (bytes of shared memory, bytes of a thread's stack)."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n == "stride_x"]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    stack = re.search(r"STACK:(\d+)", usage.stdout)
    assert stack, usage.stdout
    return found.metadata.shared, int(stack[1])


def test_tiles_fill_the_card():
    """As its weights allow: of 1.4b and 7B, on 132 multiprocessors."""
    for format in SCALED:
        for rows in (1, 16, 32, 64, 128):
            for n, k in ((8192, 2048), (2048, 4096), (50280, 2048), (16384, 4096), (4096, 8192)):
                tile = plans.tile_of(format, rows)
                assert tile.spread(rows, n, k, 132) == tile, "large weights have enough programs"
                splits, columns = tile.splits(rows, n, k, 132)
                assert (splits - 1) * columns < k <= splits * columns
                assert -(-n // tile.BN) * splits >= 128, (format, rows, n, k)
                summed = splits * rows * 8  # bytes written and read for a row of the weight, which has k as int8
                assert summed <= k or -(-n // tile.BN) * splits <= 132 or splits == 1, (format, rows, n, k)
            narrow = plans.tile_of(format, rows).spread(rows, 160, 4096, 132)
            assert narrow.BN == 32, "x_proj"
            assert -(-160 // narrow.BN) * narrow.splits(rows, 160, 4096, 132)[0] == 80


CARDS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("format", SCALED)
def test_the_tables_tiles_compile(capability, format):
    """At out_proj of the 7B shape: they fit the card's shared memory, and a Hopper's registers."""
    n, k, shared = 4096, 8192, CARDS[capability]
    types = {"x": "*bf16", "data": {"int8": "*i8", "int4": "*i16", "fp8": "*u8"}[format], "scales": "*fp32"}
    for most, product in plans.PRODUCTS[format] if capability == 90 else plans.PRODUCTS[format][::4]:
        plan = product.fitting(format, 64, 2, shared - gpu.KEPT)
        splits, columns = plan.splits(min(most, 512), n, k, 132)
        constants = {
            "N": n, "K": k, "COLUMNS": columns, "BITS": plans.BITS[format], "GROUP": 64, "BN": plan.BN, "BB": plan.BB,
            "BK": plan.BK, "STAGES": plan.stages, "SPLITS": splits, "AFTER": plan.after,
            "ROWS_FIRST": plan.rows_first, "ASM": True, "HAS_BIAS": False, "bias": None,
        }  # fmt: skip
        types["y"] = "*fp32" if splits > 1 else "*bf16"
        taken, stack = compiled(kernels.product_kernel, constants, types, capability, plan.warps)
        assert taken <= shared
        assert stack == 0 or capability != 90, f"{plan} spills"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_the_other_kernels_compile():
    common = {"N": 4096, "K": 8192, "GROUP": 64, "BN": 4, "BK": 1024, "ASM": True}
    for bits, kind in ((8, "*i8"), (4, "*i16"), (1, "*u8")):
        constants = common | {"BITS": bits}
        types = {"data": kind, "scales": "*fp32", "y": "*bf16"}
        assert compiled(kernels.widen_kernel, constants, types, 90, 4)[1] == 0
    types = {"parts": "*fp32", "y": "*bf16"}
    constants = {"N": 4096, "SPLITS": 8, "SIZE": 1024, "HAS_BIAS": False, "bias": None}
    assert compiled(kernels.sum_kernel, constants, types, 90, 4)[1] == 0
    types = {"x": "*bf16", "q": "*u8", "scales": "*fp32", "residual": "*fp32", "kept": "*fp32", "weight": "*bf16"}
    assert compiled(kernels.float8_kernel, {"K": 8192, "SIZE": 8192}, types, 90, 16)[1] == 0
    constants = {"H": 4096, "SIZE": 4096, "HAS_RESIDUAL": True, "ROUNDED": 1}
    assert compiled(kernels.norm_float8_kernel, constants, types | {"eps": "fp32"}, 90, 8)[1] == 0


@pytest.mark.skipif(INTERPRETED, reason="this is the one that starts it")
def test_interpreter():
    run_interpreted(__file__)
