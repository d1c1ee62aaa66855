"""The Triton selection_norm against float64: on a GPU, and in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambakit.ops.selection_norm import chunked  # noqa: E402
from mambakit.ops.selection_norm import triton as norm  # noqa: E402
from tests.ops.closeness import relative_error  # noqa: E402
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted  # noqa: E402

# Rounding y to bfloat16 costs 1.7e-3 at most in a norm. Triton's interpreter truncates instead: twice that.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3 if INTERPRETED else 3e-3}
# Rows, r, n.
CASES = [((2, 9), 3, 5), ((1,), 1, 1), ((67,), 48, 16), ((5, 3), 256, 16), ((0, 2), 4, 2)]
LARGE = [((4, 2048), 256, 16), ((3, 1001), 160, 64), ((8192,), 17, 5)]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel wrote cannot pass."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def check(device, shape, rank, n, dtype, weighted):
    generator = torch.Generator().manual_seed(rank)
    selected, dy = (torch.randn(*shape, rank + 2 * n, generator=generator).to(device, dtype) for _ in range(2))
    weights = [torch.randn(size, generator=generator).to(device) if weighted else None for size in (rank, n, n)]
    wide = [None if w is None else w.double() for w in weights]
    y = norm.forward(selected, *weights, rank, 1e-5)
    assert y.dtype == dtype
    assert relative_error(y, chunked.forward(selected.double(), *wide, rank, 1e-5)) < TOLERANCE[dtype]
    found = norm.backward(dy, selected, *weights, rank, 1e-5)
    expected = chunked.backward(dy.double(), selected.double(), *wide, rank, 1e-5)
    assert found[0].dtype == dtype
    # The gradient over a single channel is a difference of equal numbers: it is compared with what came in.
    error = (found[0].double() - expected[0]).norm() / torch.maximum(expected[0].norm(), dy.double().norm())
    assert not dy.numel() or error < TOLERANCE[dtype]
    for actual, want in zip(found[1:], expected[1:], strict=True):
        assert relative_error(actual, want) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
@pytest.mark.parametrize(("shape", "rank", "n"), CASES)
def test_against_float64(device, shape, rank, n, dtype, weighted):
    check(device, shape, rank, n, dtype, weighted)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
@pytest.mark.parametrize(("shape", "rank", "n"), LARGE)
def test_large_shapes(device, shape, rank, n, weighted):
    check(device, shape, rank, n, torch.bfloat16, weighted)


def compile_for_hopper(kernel, constants, types):
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "bare"])
def test_kernels_compile(weighted):
    constants = {k: v for k, v in norm.sizes(256, 16).items() if k != "num_warps"} | {"HAS_WEIGHT": weighted}
    names = ("dt_weight", "B_weight", "C_weight")
    constants |= {} if weighted else dict.fromkeys(names)
    types = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16") | dict.fromkeys((*names, "partials"), "*fp32")
    compile_for_hopper(norm._forward_kernel, constants, types | {"eps": "fp32"})
    compile_for_hopper(norm._backward_kernel, constants, types | {"eps": "fp32"})
    sums = {"R": 256, "N": 16, **{k: v for k, v in norm.SUM.items() if k != "num_warps"}}
    types |= dict.fromkeys(("ddt_weight", "dB_weight", "dC_weight"), "*bf16")
    compile_for_hopper(norm._sum_partials_kernel, sums, types)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
