"""`mambakit::linear` as torch's dispatcher knows it: fakes, gradients and shapes of every format."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.linear import chunked, linear, pack
from mambakit.ops.linear.packed import FORMATS
from mambakit.ops.linear.schema import parts_of


def weight_of(rows, columns, format, group=32):
    dtype = torch.bfloat16 if format in ("bfloat16", "lossless16") else torch.float32
    return pack(torch.randn(rows, columns).to(dtype), format, group)


def arguments(x, weight, bias=None):
    return x, *parts_of(weight), bias, weight.format, weight.in_features, weight.group


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 70), (2, 20, 70)])  # 3 rows: the native kernels; 40: torch's product
def test_opcheck(format, shape):
    weight, bias = weight_of(5, 70, format), torch.randn(5, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(torch.ops.mambakit.linear, arguments(x, weight, bias))
    torch.library.opcheck(torch.ops.mambakit.linear, arguments(x.detach().bfloat16(), weight))
    torch.library.opcheck(torch.ops.mambakit.dequantize, (*parts_of(weight), format, 70, 32))


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_any_order(format):
    weight = weight_of(5, 70, format)
    x, bias = torch.randn(2, 70, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: linear(x, weight, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: linear(x, weight, b).square(), (x, bias))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_few_rows_is_plain_pytorchs(format, dtype):
    weight = weight_of(5, 70, format)
    x, dy = torch.randn(3, 70, dtype=dtype, requires_grad=True), torch.randn(3, 5, dtype=dtype)
    bias = torch.randn(5, requires_grad=True)
    found = torch.autograd.grad(linear(x, weight, bias), (x, bias), dy)
    expected = torch.autograd.grad(chunked.linear(x, weight, bias), (x, bias), dy)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_on_meta():
    weight = weight_of(5, 70, "int4")
    parts = [None if t is None else t.to("meta") for t in parts_of(weight)]
    x = torch.empty(2, 3, 70, dtype=torch.bfloat16, device="meta")
    y = torch.ops.mambakit.linear(x, *parts, None, "int4", 70, 32)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.bfloat16, "meta")
