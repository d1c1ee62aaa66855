"""Packed weights: the formats, the products, and independence of a row from its batch."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops import native
from mambakit.ops.linear import linear, pack, reference
from mambakit.ops.linear.api import FORMATS
from tests.ops.oracles import in_16_bits, relative_error

# float32 and bfloat16 weights: cancellation in sums of 1000. int8 and int4: the kernels round x to 16 bits per group.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-5, "int8": 4e-5, "int4": 4e-5}
ISAS = native.describe().get("supported") or [None]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    native.use_isa(request.param)
    yield request.param
    native.use_isa(None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (5, 128), (33, 200), (130, 768), (3, 1000)])
def test_products_against_float64(format, shape):
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    packed = pack(weight, format)
    for b in (1, 2, 3, 7, 16):
        x = torch.randn(b, shape[1])
        want = x.double() @ packed.dequantized().double().T
        assert relative_error(linear(x, packed), want) < BOUNDS[format]
        assert relative_error(linear(x, packed, bias), want + bias) < BOUNDS[format]
        half = linear(x.bfloat16(), packed)
        assert half.dtype == torch.bfloat16
        assert relative_error(half, x.bfloat16().double() @ packed.dequantized().double().T) < 4e-3


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


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_alone_is_the_row_of_a_batch(format):
    packed = pack(torch.randn(101, 300), format)
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
    rounded = in_16_bits(x, group)
    want = rounded @ packed.dequantized().double().T
    # Against the size of what is summed. A tie may round either way where float32 and this test divide differently: 2^-16.
    size = rounded.abs() @ packed.dequantized().double().abs().T
    assert ((linear(x, packed) - want).abs() <= 2**-16 * size).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_in_x_shows(format, fault):
    packed = pack(torch.randn(6, 200), format)
    x = torch.randn(3, 200)
    x[1, 70] = fault
    y = linear(x, packed)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, 2]], linear(x[[0, 2]], packed))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_tiny_numbers(format):
    packed = pack(torch.randn(6, 200), format)
    assert not linear(torch.zeros(2, 200), packed).any()
    x = torch.randn(2, 200) * 1e-30
    assert relative_error(linear(x, packed), x.double() @ packed.dequantized().double().T) < BOUNDS[format]


def test_many_rows_use_the_reference():
    packed = pack(torch.randn(8, 64), "int8")
    x = torch.randn(3, 11, 64)
    assert torch.equal(linear(x, packed), reference.linear(x, packed, None))
    assert linear(torch.randn(2, 3, 64), packed).shape == (2, 3, 8)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="choose one of"):
        pack(torch.randn(2, 2), "int3")
    with pytest.raises(ValueError, match="choose 32, 64 or 128"):
        pack(torch.randn(2, 2), "int8", 48)
    with pytest.raises(ValueError, match="not finite"):
        pack(torch.full((2, 2), float("nan")), "int4")
    with pytest.raises(ValueError, match="takes 64 features"):
        linear(torch.randn(2, 3), pack(torch.randn(8, 64), "int8"))
