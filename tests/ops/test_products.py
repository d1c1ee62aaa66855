"""Products of bfloat16 on a processor that has no instructions for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambakit.ops import _products
from mambakit.ops._backends import native
from mambakit.ops._products import linear
from tests.ops.closeness import relative_error


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(native, "lacks_bfloat16_products", lambda: True)
    monkeypatch.setattr(_products, "_WIDENED_BYTES", 4 * 70 * 9)  # nine rows of the weight at once


def refuse(*_):
    raise AssertionError("torch's product of bfloat16 was called")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(17, 70), (3, 11, 70), (2, 0, 70)])
@torch.no_grad()
def test_rounded_once(shape, bias, monkeypatch):
    x, weight = torch.randn(*shape).bfloat16(), torch.randn(31, 70).bfloat16()
    offset = torch.randn(31).bfloat16() if bias else None
    want = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    y = linear(x, weight, offset)
    assert y.shape == want.shape
    assert y.dtype == torch.bfloat16
    if not x.numel():
        return
    assert relative_error(y, want) < 3e-3  # bfloat16's rounding alone: 1.7e-3
    off = (y.double() - want).abs() > 2**-8 * want.abs() + 1e-4  # one rounding: half of a step is 2^-9
    assert not off.any()
    kept = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: refuse() if x.dtype == torch.bfloat16 else kept(x, *rest))
    assert torch.equal(linear(x, weight, offset), y)


def test_whatever_else_is_torchs():
    weight = torch.randn(31, 70).bfloat16()
    x = torch.randn(40, 70).bfloat16()
    few = x[:16]
    wide = weight.float()
    with torch.no_grad():
        assert torch.equal(linear(few, weight), F.linear(few, weight))
        assert torch.equal(linear(x.float(), wide), F.linear(x.float(), wide))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert linear(x.to("meta"), weight.to("meta")).shape == (40, 31)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, weight).sum(), x)
    assert relative_error(gradient, weight.double().sum(0).expand(40, 70)) < 3e-3


@torch.no_grad()
def test_strided_rows():
    x, weight = torch.randn(2, 70, 40).bfloat16().transpose(1, 2), torch.randn(31, 140).bfloat16()[:, ::2]
    assert relative_error(linear(x, weight), x.double() @ weight.double().T) < 3e-3
