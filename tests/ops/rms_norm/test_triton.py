"""The Triton RMSNorm against the float64 reference: on a GPU, and in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambakit.ops.rms_norm import chunked  # noqa: E402
from mambakit.ops.rms_norm import triton as norm  # noqa: E402
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted  # noqa: E402

# Rounding y to bfloat16 costs 1.7e-3 at most in this norm. Triton's interpreter truncates instead: twice that.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3 if INTERPRETED else 3e-3}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# shape, x, residual (None: absent), residual_dtype, out_dtype, weight, gradient of the residual stream, strided
CASES = [
    ((2, 5, 64), BF16, F32, F32, BF16, True, True, False),
    ((2, 5, 64), BF16, None, F32, BF16, True, True, True),
    ((3, 7, 100), F32, F32, F32, F32, True, True, True),
    ((4, 33), F16, F16, F16, F16, True, False, False),
    ((3, 1, 2, 40), BF16, BF16, BF16, F32, False, True, False),
    ((1, 3), F32, None, F32, F32, True, False, False),
    ((2, 3, 1000), BF16, F32, F32, BF16, True, False, True),
    ((2, 2500), F32, None, F32, BF16, True, True, False),
    ((2, 0, 16), BF16, F32, F32, BF16, True, True, False),
    ((9,), F32, F32, F32, F32, True, True, False),
]
LARGE = [
    ((16, 511, 768), BF16, F32, F32, BF16, True, True, True),
    ((3, 1001, 5120), BF16, F32, F32, BF16, True, True, False),
    ((2, 333, 8192), BF16, BF16, BF16, BF16, True, True, True),
    ((37, 20000), F32, F32, F32, F32, True, True, False),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_close(got, expected, dtype, name):
    assert got.shape == expected.shape, name
    assert got.is_contiguous(), name
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert expected.numel() == 0 or error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def inputs(case, device):
    shape, x_dtype, residual_dtype, kept_dtype, out_dtype, has_weight, has_dkept, strided = case
    random = torch.Generator().manual_seed(shape[-1])
    width = (*shape[:-1], 2 * shape[-1] + 8) if strided else shape
    normal = lambda dtype: torch.randn(width, generator=random).to(dtype).to(device)[..., : shape[-1]]  # noqa: E731
    x, residual = normal(x_dtype), None if residual_dtype is None else normal(residual_dtype)
    weight = torch.randn(shape[-1], generator=random).to(device) if has_weight else None
    return x, residual, weight, normal(out_dtype), normal(kept_dtype) if has_dkept else None


def check(case, device):
    _, x_dtype, _, kept_dtype, out_dtype, *_ = case
    x, residual, weight, dy, dkept = inputs(case, device)
    y, kept = norm.forward(x, weight, residual, 1e-5, kept_dtype, out_dtype)
    want_y, want_kept = chunked.forward(*map(exact, (x, weight, residual)), 1e-5, torch.float64, torch.float64)
    assert (y.dtype, kept.dtype) == (out_dtype, kept_dtype)
    assert_close(kept, want_kept, kept_dtype, "residual")
    if kept_dtype != F32:  # y is the norm of the rounded sum
        want_y, _ = chunked.forward(exact(kept), exact(weight), None, 1e-5, torch.float64, torch.float64)
    assert_close(y, want_y, out_dtype, "y")

    got = norm.backward(dy, dkept, kept, weight, 1e-5, x_dtype, residual is not None)
    want = chunked.backward(*map(exact, (dy, dkept, kept, weight)), 1e-5, torch.float64, residual is not None)
    assert_close(got[0], want[0], x_dtype, "dx")
    assert_close(got[1], want[1], F32, "dweight")
    assert_close(got[2], want[2], kept_dtype, "dresidual")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_reference(device, case):
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_matches_reference_on_large_shapes(device, case):
    check(case, device)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_same_inputs_same_bits(device):
    x, residual, weight, dy, dkept = inputs(LARGE[0], device)
    _, kept = norm.forward(x, weight, residual, 1e-5, F32, BF16)
    runs = [norm.backward(dy, dkept, kept, weight, 1e-5, BF16, True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def compile_for_hopper(kernel, constants, **types):
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_kernels_compile():
    flags = {"ROWS": 2, "BLOCK_H": 512, "HAS_WEIGHT": True, "HAS_RESIDUAL": True}
    half = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16") | {"eps": "fp32"}
    single = dict.fromkeys(("weight", "residual", "kept", "dkept", "dresidual", "partials", "dweight"), "*fp32")
    compile_for_hopper(norm._forward_kernel, flags, **half, **single)
    compile_for_hopper(norm._backward_kernel, {"HAS_DKEPT": True, **flags}, **half, **single)
    compile_for_hopper(norm._sum_partials_kernel, {"ROWS": 512, "BLOCK_H": 16}, **single)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
