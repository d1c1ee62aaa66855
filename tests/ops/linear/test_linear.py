"""Packed weights: the formats, the products, and independence of a row from its batch."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops._backends import native
from mambakit.ops.linear import chunked, cpu, linear, pack, reference
from mambakit.ops.linear.packed import FORMATS, dequantize, to_float8
from tests.ops.closeness import relative_error

DTYPES = {"bfloat16": torch.bfloat16, "lossless16": torch.bfloat16}
# float32 and bfloat16 weights: cancellation in sums of 1000. int8 and int4: the kernels round x to 16 bits per group.
BOUNDS = dict.fromkeys(FORMATS, 1e-5) | {"int8": 4e-5, "int4": 4e-5}
ISAS = native.describe().get("supported") or [None]


def weight_of(rows, columns, format):
    return torch.randn(rows, columns).to(DTYPES.get(format, torch.float32))


@pytest.fixture(params=ISAS, autouse=True)
def instruction_set(request):
    native.use_isa(request.param)
    yield request.param
    native.use_isa(None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (5, 128), (33, 200), (130, 768), (3, 1000)])
def test_products_against_float64(format, shape):
    weight, bias = weight_of(*shape, format), torch.randn(shape[0])
    packed = pack(weight, format)
    for b in (1, 2, 3, 7, 16):
        x = torch.randn(b, shape[1])
        want = x.double() @ packed.dequantized().double().T
        assert relative_error(linear(x, packed), want) < BOUNDS[format]
        assert relative_error(linear(x, packed, bias), want + bias) < BOUNDS[format]
        half = linear(x.bfloat16(), packed)
        assert half.dtype == torch.bfloat16
        assert relative_error(half, x.bfloat16().double() @ packed.dequantized().double().T) < 4e-3


@pytest.mark.parametrize("format", cpu.KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (33, 200), (600, 768)])
def test_the_kernel_takes_many_rows(format, shape):
    """As a prompt's products do: blocks of 16 rows, whose bits do not depend on each other."""
    packed, bias = pack(weight_of(*shape, format), format), torch.randn(shape[0])
    x = torch.randn(70, shape[1])
    for rows in (17, 32, 70):
        blocks = [cpu.linear(block, packed, bias) for block in x[:rows].split(16)]
        assert torch.equal(cpu.linear(x[:rows], packed, bias), torch.cat(blocks))


@pytest.mark.parametrize("format,bits,bound", [("int8", 8.5, 7e-3), ("int4", 4.5, 1.2e-1)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantisation(format, bits, bound, group):
    weight = torch.randn(64, 768)
    weight[3] = 0
    packed = pack(weight, format, group)
    assert packed.nbytes * 8 / weight.numel() == bits - 0.5 + 32 / group
    assert relative_error(packed.dequantized(), weight) < bound
    assert not packed.dequantized()[3].any()
    x = torch.randn(2, 768)
    assert relative_error(linear(x, packed), x.double() @ packed.dequantized().double().T) < BOUNDS[format]


def test_int4_levels_survive():
    weight = torch.arange(-8, 8).float().repeat(2, 16)[:, :200]  # 200 columns: a padded block
    packed = pack(weight, "int4")
    assert torch.equal(packed.dequantized(), weight)


@pytest.mark.parametrize("format", cpu.KINDS)
def test_a_row_alone_is_the_row_of_a_batch(format):
    packed = pack(weight_of(101, 300, format), format)
    x = torch.randn(13, 300)
    y = linear(x, packed)
    for row in range(13):
        assert torch.equal(linear(x[row : row + 1], packed), y[row : row + 1])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 31, 64, 65, 97, 129, 300])
def test_integer_products_are_those_of_x_in_16_bits(format, group, columns):
    """Not a bit more is lost than rounding x says: the sums are exact within a group."""
    packed = pack(torch.randn(9, columns), format, group)
    x = torch.randn(5, columns) * torch.logspace(-20, 20, columns)  # every group has a scale of its own
    rounded = reference.in_16_bits(x, group)
    want = rounded @ packed.dequantized().double().T
    # Against the size of what is summed. A tie may round either way where float32 and this test divide differently:
    # 2^-16.
    size = rounded.abs() @ packed.dequantized().double().abs().T
    assert ((linear(x, packed) - want).abs() <= 2**-16 * size).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_in_x_shows(format, fault):
    packed = pack(weight_of(6, 200, format), format)
    x = torch.randn(3, 200)
    x[1, 70] = fault
    y = linear(x, packed)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, 2]], linear(x[[0, 2]], packed))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_tiny_numbers(format):
    packed = pack(weight_of(6, 200, format), format)
    assert not linear(torch.zeros(2, 200), packed).any()
    x = torch.randn(2, 200) * 1e-30
    assert relative_error(linear(x, packed), x.double() @ packed.dequantized().double().T) < BOUNDS[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [1, 64, 100, 300])
def test_many_rows_use_the_reference(format, columns):
    packed = pack(weight_of(21, columns, format), format, 32)
    x = torch.randn(3, 11, columns)
    assert format not in cpu.KINDS or torch.equal(cpu.widen(packed), packed.dequantized())
    assert torch.equal(linear(x, packed), chunked.linear(x, packed, None))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [1, 65, 130])
def test_the_packed_bits_stand_for_these_numbers(format, columns):
    """Read column by column as the format is described, by no code that packs or unpacks."""
    weight = weight_of(7, columns, format)
    weight[2] *= torch.logspace(-9, 0, columns).to(weight.dtype)  # the lossless formats list the small ones
    packed = pack(weight, format, 32)
    assert torch.equal(packed.dequantized(), reference.numbers(packed).float())
    x, bias = torch.randn(2, columns), torch.randn(7)
    want = reference.linear(x, packed, bias, x_in_16_bits=True)
    # A tie may round either way where float32 and the reference divide differently: 2^-16 of a group's largest number.
    assert relative_error(linear(x, packed, bias), want) < BOUNDS[format]


def test_fp8_is_e4m3_with_a_scale_for_each_row():
    weight = torch.randn(33, 200) * torch.logspace(-3, 3, 33)[:, None]
    weight[4] = 0
    packed = pack(weight, "fp8")
    assert packed.data.dtype == torch.uint8
    assert packed.nbytes == 33 * (200 + 4)
    error = (packed.dequantized() - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(weight.abs() * 2**-4, largest * 2**-10 / 448)).all()  # 4 bits, or half of 2^-9
    assert relative_error(packed.dequantized().abs().amax(1), weight.abs().amax(1)) < 1e-7
    again, scales = to_float8(packed.dequantized())
    assert torch.equal(again.view(torch.uint8), packed.data)
    assert relative_error(scales, packed.scales) < 1e-7


def test_shapes():
    packed = pack(torch.randn(8, 64), "int8")
    assert linear(torch.randn(2, 3, 64), packed).shape == (2, 3, 8)


def unusual(dtype):
    """Rows of every kind: normal, of wide range, zeros of both signs, tiny, huge, subnormal, not finite, one weight
    alone."""
    weight = torch.randn(9, 130)
    weight[1] *= torch.logspace(-30, 30, 130)
    weight[2] = 0
    weight[2, ::3] = -0.0
    weight[3] *= 1e-39
    weight[4] *= 1e37
    weight[5, 7], weight[5, 8], weight[5, 9] = float("inf"), -float("inf"), float("nan")
    weight[6] = 0
    weight[6, 129] = 3.25
    weight[7, :64] *= 2.0**-14
    weight[8, 5] = 1e-20
    return weight.to(dtype)


@pytest.mark.parametrize("format", ["lossless32", "lossless16"])
def test_lossless_is(format):
    dtype, integer = (torch.float32, torch.int32) if format == "lossless32" else (torch.bfloat16, torch.int16)
    weight = unusual(dtype)
    packed = pack(weight, format)
    for again in (packed.dequantized(), cpu.widen(packed), dequantize(packed)):
        assert torch.equal(again.to(dtype).view(integer), weight.view(integer))  # the bits: NaN and -0 too
    x = torch.randn(4, 130)
    rows = [0, 1, 2, 3, 6, 7, 8]
    want = x.double() @ weight.double()[rows].T
    size = x.double().abs() @ weight.double()[rows].abs().T
    assert ((linear(x, packed)[:, rows] - want).abs() <= 1e-6 * size + 1e-44).all()


def test_lossless_is_small():
    for format, bits in (("lossless32", 28), ("lossless16", 12)):
        packed = pack(weight_of(512, 768, format), format)
        assert packed.nbytes * 8 / (512 * 768) < 1.02 * bits
        assert len(packed.exceptions[1]) < 512 * 768 / 2000


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="choose one of"):
        pack(torch.randn(2, 2), "int3")
    with pytest.raises(ValueError, match="choose 32, 64 or 128"):
        pack(torch.randn(2, 2), "int8", 48)
    with pytest.raises(ValueError, match="not finite"):
        pack(torch.full((2, 2), float("nan")), "int4")
    with pytest.raises(ValueError, match="holds torch.bfloat16 and the weight is torch.float32; cast it first"):
        pack(torch.randn(2, 2), "lossless16")
    with pytest.raises(ValueError, match="takes 64 features"):
        linear(torch.randn(2, 3), pack(torch.randn(8, 64), "int8"))
