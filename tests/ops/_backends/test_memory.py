"""An address is given away of plain memory alone; whatever else a tensor may be, an op answers with the reference's
numbers or an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mambakit.ops import causal_conv1d, causal_conv1d_, rms_norm, selective_scan, selective_scan_
from mambakit.ops._backends import native
from mambakit.ops._backends.memory import (
    FLOAT32,
    PlainMemoryError,
    address,
    address_of_rows,
    all_plain,
    is_plain,
    observed,
    transformed,
)
from mambakit.ops.linear import PackedWeight, chunked, linear, pack
from mambakit.ops.linear.packed import FORMATS
from tests.tensor_subclasses import Doubled, Named, doubled

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason="the native library is not built"),
    pytest.mark.filterwarnings("ignore"),
]


def special() -> dict[str, torch.Tensor]:
    """(4, 6) float32 tensors whose address does not say what is in them."""
    plain = torch.randn(4, 6)
    freed = torch.randn(4, 6)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.empty(4, 6)
    return {
        "meta": plain.to("meta"), "sparse": plain.to_sparse(), "csr": plain.to_sparse_csr(),
        "mkldnn": plain.to_mkldnn(), "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([plain[:2], plain[2:]]),
        "jagged": torch.nested.nested_tensor([plain[:2], plain[2:]], layout=torch.jagged),
        "negated": torch.view_as_complex(torch.randn(4, 6, 2)).conj().imag,
        "zeros without memory": torch._efficientzerotensor((4, 6)),
        "functional": torch._to_functional_tensor(plain), "freed": freed, "fake": fake,
        "subclass": plain.as_subclass(Named), "wrapper": doubled(plain),
        "wrapped parameter": nn.Parameter(doubled(plain)),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(special()))
def test_no_address_of_what_is_special(name):
    tensor = special()[name]
    assert not is_plain(tensor)
    assert not all_plain([torch.ones(1), None, tensor])
    with pytest.raises(PlainMemoryError, match="plain memory"):
        address(tensor, FLOAT32, 24)
    with pytest.raises(PlainMemoryError, match="plain memory"):
        address_of_rows(tensor, FLOAT32, (4, 6))


def test_no_address_inside_a_functorch_transform():
    def look(x):
        assert not is_plain(x)
        with pytest.raises(PlainMemoryError):
            address(x, FLOAT32, x.numel())
        return x.sum()

    torch.func.vmap(look)(torch.randn(4, 6))
    torch.func.grad(look)(torch.randn(4, 6))


def test_no_address_of_another_dtype_size_or_layout():
    x = torch.randn(4, 6)
    assert is_plain(x)
    assert is_plain(nn.Parameter(x))
    assert is_plain(x[:, 1:3])
    assert is_plain(torch.empty(0))
    assert address(x, FLOAT32, 24) == address_of_rows(x, FLOAT32, (4, 6)) == x.data_ptr()
    assert address_of_rows(x[:, 1:3], FLOAT32, (4, 2)) == x.data_ptr() + 4
    assert address(torch.empty(0), FLOAT32, 0) == 0
    for wrong in (x.double(), x.half(), x.long(), x.T, x[:, 1:3], x[:2], x.expand(2, 4, 6), x.to("meta")):
        with pytest.raises(PlainMemoryError, match="24 contiguous elements"):
            address(wrong, FLOAT32, 24)
    for wrong in (x.double(), x.T, x[:2], x.T.contiguous().T):
        with pytest.raises(PlainMemoryError, match=r"shape \(4, 6\)"):
            address_of_rows(wrong, FLOAT32, (4, 6))


def arguments():
    b, l, d, n = 2, 5, 8, 4  # noqa: E741, the length
    u, delta = torch.randn(b, l, d), torch.randn(b, l, d)
    return u, delta, -torch.rand(d, n), torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(d)


@pytest.mark.parametrize("which", range(6))
def test_a_subclass_with_memory_of_its_own_is_the_references(which):
    inputs = list(arguments())
    expected, _ = selective_scan(*inputs, delta_softplus=True)
    inputs[which] = inputs[which].as_subclass(Named)
    found, _ = selective_scan(*inputs, delta_softplus=True)
    assert torch.allclose(torch.as_tensor(found).as_subclass(torch.Tensor), expected, atol=1e-5)


def test_a_wrapper_is_asked_itself():
    """The dispatcher hands a wrapper's op to the wrapper, which unwraps: nobody reads its address."""
    u, delta, A, B, C, D = arguments()
    plain, _ = selective_scan(u, delta, A, B, C, D)
    assert torch.allclose(selective_scan(u, delta, A, B, C, doubled(D))[0], plain, atol=1e-5)
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 4)
    assert torch.allclose(causal_conv1d(x, doubled(weight))[0], causal_conv1d(x, weight)[0], atol=1e-5)
    assert torch.allclose(rms_norm(x, doubled(D))[0], rms_norm(x, D)[0], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["negated", "zeros without memory", "subclass", "wrapper"])
def test_a_packed_product_of_what_is_special(format, name):
    x = special()[name]
    weight = pack(torch.randn(5, 6).to(torch.bfloat16 if format == "lossless16" else torch.float32), format)
    plain = x.dequantize() if isinstance(x, Doubled) else x.as_subclass(torch.Tensor) + 0
    expected = chunked.linear(plain, weight, None)
    found = linear(x, weight)
    found = found.dequantize() if isinstance(found, Doubled) else found.as_subclass(torch.Tensor)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    rows = linear(torch.cat([plain] * 5), weight)
    assert torch.allclose(rows[:4], expected, rtol=1e-3, atol=1e-3)


def test_a_packed_product_that_somebody_transforms_or_follows():
    weight, x = pack(torch.randn(5, 6), "int8"), torch.randn(3, 6)
    plain = chunked.linear(x, weight, None)
    assert torch.allclose(torch.func.vmap(lambda row: linear(row, weight))(x), plain, atol=1e-5)
    assert torch.allclose(torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))[1], plain, atol=1e-5)
    assert torch.func.grad(lambda x: linear(x, weight).sum())(x).shape == x.shape
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 5 * 6
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert linear(torch.empty(3, 6), weight).shape == (3, 5)
    bias = nn.Parameter(torch.zeros(5))
    linear(x, weight, bias).sum().backward()
    assert bias.grad is not None, "the bias is trained though x has no gradient"


def test_who_counts_as_transforming_or_following():
    assert not transformed()
    assert not observed()
    with torch.device("meta"):
        assert not observed()
    with FlopCounterMode(display=False):
        assert observed()
    torch.func.vmap(lambda x: assert_and_return(transformed(), x))(torch.ones(2))


def assert_and_return(fact, x):
    assert fact
    return x


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_weight_that_does_not_fit_itself(format):
    """The product raises instead of reading past the end."""
    numbers = torch.randn(8, 70)
    numbers[:, 0] = 1e-30  # what a lossless format lists
    weight = pack(numbers.to(torch.bfloat16 if format == "lossless16" else torch.float32), format)
    parts = weight.tensors()
    for name, tensor in parts.items():
        short = {**parts, name: tensor[: len(tensor) // 2]}
        exceptions = (short["starts"], short["columns"], short["values"]) if "starts" in short else None
        wrong = PackedWeight(format, short["data"], short.get("scales"), 70, 64, exceptions)
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            linear(torch.randn(1, 70), wrong, torch.zeros(8))


def test_packed_weights_of_missing_parts_are_refused():
    data, scales = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 1)
    for format, group, given in (
        ("int8", 64, None),
        ("int8", 0, scales),
        ("float32", 64, scales),
        ("int3", 64, scales),
        ("lossless32", 64, None),
    ):
        with pytest.raises(ValueError, match="PackedWeight"):
            PackedWeight(format, data, given, 64, group)


def test_lengths_and_slots_are_checked_where_they_are_used():
    """A caller of the registered op (a compiled or exported program) does not come through the public function."""
    u, delta, A, B, C, D = arguments()
    pool, window = torch.zeros(3, 8, 4), torch.zeros(3, 8, 3)
    for slots in ([0, 3], [1, 1], [0, 2**30]):
        where = torch.tensor(slots, dtype=torch.int32)
        with pytest.raises(ValueError, match="slot"):
            torch.ops.mambakit.selective_scan_(pool, where, u, delta, A, B, C, D, None, None, False, None)
        with pytest.raises(ValueError, match="slot"):
            torch.ops.mambakit.causal_conv1d_(window, where, u, torch.randn(8, 4), None, "silu", None)
    row = [t[:1] for t in (u, delta, B, C)]
    for lengths in ([0, 9], [0, 4, 2, 5], [-1, 5], [0, 2**30, 5]):
        cu = torch.tensor(lengths, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens"):
            torch.ops.mambakit.selective_scan(row[0], row[1], A, row[2], row[3], D, None, None, False, None, cu, 0)
        with pytest.raises(ValueError, match="cu_seqlens"):
            torch.ops.mambakit.causal_conv1d(row[0], torch.randn(8, 4), None, "silu", None, cu)


@pytest.mark.parametrize("which", range(6))
def test_shapes_that_do_not_fit_are_refused_below_the_public_function(which):
    inputs = list(arguments())
    inputs[which] = inputs[which][..., :-1]
    u, delta, A, B, C, D = inputs
    with pytest.raises((TypeError, RuntimeError)):
        torch.ops.mambakit.selective_scan(u, delta, A, B, C, D, None, None, False, None, None, 0)


def test_in_place_ops_take_a_pool_that_is_larger():
    u, delta, A, B, C, D = arguments()
    pool, window = torch.zeros(5, 8, 4), torch.zeros(5, 8, 3)
    y, _ = selective_scan_(u, delta, A, B, C, D, state=pool)
    assert torch.allclose(y, selective_scan(u, delta, A, B, C, D)[0], atol=1e-5)
    assert not pool[2:].any()
    causal_conv1d_(u, torch.randn(8, 4), state=window)
    assert not window[2:].any()
    assert window[:2].any()
