"""Every op gives the same numbers, outputs and gradients, whatever torch's default dtype and device are, and reads no
memory that nobody wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mambakit.ops import causal_conv1d, causal_conv1d_, linear_cross_entropy, rms_norm, selective_scan, selective_scan_
from mambakit.ops.linear import linear, pack
from mambakit.ops.linear.packed import FORMATS, blank
from tests.torch_settings import SETTINGS, setting

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Run = Callable[[], list[Tensor]]


def with_gradients(op: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> list[Tensor]:
    """Outputs, and the gradients of what is floating."""
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    outputs = op(*leaves)
    floating = [t for t in leaves if t is not None and t.requires_grad]
    weights = [t.detach().cos() for t in outputs]
    total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    return [t.detach() for t in (*outputs, *torch.autograd.grad(total, floating, allow_unused=True)) if t is not None]


def ops(dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """Every op, with each of its optional arguments given and absent, packed and not."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(to)

    b, l, d, n, k = 2, 70, 19, 5, 4  # noqa: E741, the length
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta, z, dy = (make(b, l, d) for _ in range(4))
    B, C = (make(b, l, n) for _ in range(2))
    A, D, bias, state = -make(d, n, to=wide).exp(), make(d, to=wide), make(d, to=wide), make(b, d, n, to=wide)
    weight, conv_bias, window = make(d, k), make(d), make(b, d, k - 1)
    cu = torch.tensor([0, 30, 30, l], dtype=torch.int32)
    slots = torch.tensor([3, -1], dtype=torch.int32)
    row = [t[:1] for t in (u, delta, B, C, z)]

    def scan(u, delta, A, B, C, D, z, bias, state, cu=None):
        return selective_scan(u, delta, A, B, C, D, z, bias, True, initial_state=state, cu_seqlens=cu)

    yield "scan", lambda: with_gradients(scan, u, delta, A, B, C, D, z, bias, state)
    yield "scan, bare", lambda: with_gradients(scan, u, delta, A, B, C, None, None, None, None)
    yield (
        "scan, one token",
        lambda: with_gradients(scan, u[:, :1], delta[:, :1], A, B[:, :1], C[:, :1], D, z[:, :1], bias, state),
    )
    uu, dd, BB, CC, zz = row
    yield "scan, packed", lambda: with_gradients(scan, uu, dd, A, BB, CC, D, zz, bias, None, cu)

    def scan_in_place() -> list[Tensor]:
        pool = state.new_zeros(5, d, n) + state[:1]
        with torch.no_grad():
            return list(selective_scan_(u, delta, A, B, C, D, z, bias, True, state=pool, slot_indices=slots))

    def convolve(x, weight, bias, state, cu=None):
        return causal_conv1d(x, weight, bias, initial_state=state, cu_seqlens=cu)

    def convolve_in_place() -> list[Tensor]:
        pool = window.new_zeros(5, d, k - 1) + window[:1]
        with torch.no_grad():
            return list(causal_conv1d_(u, weight, conv_bias, state=pool, slot_indices=slots))

    yield "scan in place", scan_in_place
    yield "convolution", lambda: with_gradients(convolve, u, weight, conv_bias, window)
    yield "convolution, bare", lambda: with_gradients(convolve, u, weight, None, None)
    yield "convolution, packed", lambda: with_gradients(convolve, uu, weight, conv_bias, None, cu)
    yield "convolution in place", convolve_in_place
    yield "norm", lambda: with_gradients(lambda x, w, r: rms_norm(x, w, residual=r), u, D.to(dtype), dy)
    yield "norm, bare", lambda: with_gradients(lambda x: rms_norm(x), u)
    yield "norm of a slice", lambda: with_gradients(lambda x: rms_norm(x[..., :7]), u)
    hidden, head, targets = make(9, d), make(23, d), torch.arange(9) % 23
    yield "loss", lambda: with_gradients(lambda h, w: (linear_cross_entropy(h, w, targets),), hidden, head)
    for format in FORMATS:
        packed = pack(make(33, d, to=torch.bfloat16 if format.endswith("16") else torch.float32), format)
        for rows in (1, 40):
            x, shift = make(rows, d), make(33, to=torch.float32)
            yield f"{format} product of {rows}", lambda x=x, packed=packed, shift=shift: [linear(x, packed, shift)]
        yield f"{format} unpacked", lambda packed=packed: [packed.dequantized()]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_an_op_does_not_depend_on_torchs_settings(name, dtype):
    for op, run in ops(dtype):
        expected = run()
        with setting(name):
            found = run()
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.dtype == theirs.dtype, (op, i)
            assert ours.device == theirs.device, (op, i)
            assert torch.equal(ours, theirs), (op, i)


@pytest.mark.parametrize("name", ["float16", "float64", "meta"])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_does_not_depend_on_torchs_settings(name, format):
    weight = torch.randn(33, 19).to(torch.bfloat16 if format.endswith("16") else torch.float32)
    expected = pack(weight, format)
    with setting(name):
        found = pack(weight, format)
    for part, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[part], tensor), part


@pytest.mark.parametrize("format", ["int8", "int4", "lossless32", "lossless16"])
def test_a_blank_weight_has_the_dtypes_of_its_format(format):
    expected = {name: (t.dtype, t.shape) for name, t in blank(format, 33, 70).tensors().items() if name != "columns"}
    with setting("float64"):
        found = {name: (t.dtype, t.shape) for name, t in blank(format, 33, 70).tensors().items() if name != "columns"}
    assert found == expected
