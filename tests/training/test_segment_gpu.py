"""The Triton form of `segment.py`: its logic under Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mambakit.training.distributed import context_parallel, stretch
from mambakit.training.distributed.segment import segment_gradient, segment_map
from tests.models.configurations import worst
from tests.training.launch import launch

CASES = [
    # b, l, d, n, edge, with bias, softplus and gate, size of A (large: most stretches vanish)
    (2, 1, 3, 4, None, True, 1.0),
    (1, 200, 37, 16, None, True, 0.01),
    (2, 130, 5, 5, None, False, 0.1),
    (1, 131, 8, 16, 70, True, 0.02),
    (1, 600, 8, 16, 64, True, 3.0),
]


def check(device: str, dtype: torch.dtype, cases: list = CASES) -> None:
    from mambakit.training.distributed import segment_gpu as gpu

    torch.manual_seed(0)
    for b, length, d, n, edge, whole, size in cases:
        wide = torch.randn(b, length, 3 * d + 2 * n, device=device).to(dtype)
        u, delta, z, B, C = wide.split([d, d, d, n, n], -1)
        A, bias = -torch.rand(d, n, device=device) * size, torch.randn(d, device=device)
        if not whole:
            bias, z, delta = None, None, delta.abs()
        at = None if edge is None else torch.tensor(edge, device=device, dtype=torch.int32)
        double = [None if t is None else t.double().cpu() for t in (u, delta, A, B, C, z, bias)]
        u2, delta2, A2, B2, C2, z2, bias2 = double
        at2 = None if at is None else at.cpu()
        found = (
            *gpu.segment_map(u, delta, A, B, bias, whole, at),
            gpu.segment_gradient(u, delta, A, C, z, bias, whole, at),
        )
        wanted = (
            *segment_map(u2, delta2, A2, B2, bias2, whole, at2),
            segment_gradient(u2, delta2, A2, C2, z2, bias2, whole, at2),
        )
        for name, actual, expected in zip(("decay", "state", "gradient"), found, wanted, strict=True):
            # Inputs are the same numbers on both sides, whatever their dtype: what is left is float32's rounding.
            assert worst(actual.cpu(), expected) < 3e-6, (name, length)


def test_the_sums_stop_only_where_nothing_is_left():
    """Against the recurrence itself, on segments far longer than the state lives."""
    torch.manual_seed(0)
    length, d, n = 3000, 4, 3
    u, delta = torch.randn(2, 1, length, d, dtype=torch.float64)
    B, C = torch.randn(2, 1, length, n, dtype=torch.float64)
    A = -torch.rand(d, n, dtype=torch.float64) - 0.3
    h, steps = torch.zeros(1, d, n, dtype=torch.float64), torch.nn.functional.softplus(delta)
    for t in range(length):
        h = torch.exp(steps[:, t, :, None] * A) * h + (steps[:, t] * u[:, t])[..., None] * B[:, t, None]
    decay, state = segment_map(u, delta, A, B, None, True)
    assert worst(state, h) < 1e-13
    assert decay.max() == 0
    g = torch.zeros_like(h)
    for t in reversed(range(length)):
        g = torch.exp(steps[:, t, :, None] * A) * (g + u[:, t, :, None] * C[:, t, None])
    assert worst(segment_gradient(u, delta, A, C, None, None, True), g) < 1e-13


def test_interpreted():
    pytest.importorskip("triton")
    # One program takes the interpreter a tenth of a second.
    cases = [(1, 70, 3, 4, None, False, 0.1), (1, 131, 8, 16, 70, True, 0.02), (1, 200, 3, 16, 40, True, 3.0)]
    code = f"import torch; from {__name__} import check; check('cpu', torch.float32, {cases})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def compile_for_hopper(kernel, constants, **types):
    """What the interpreter cannot tell: that the compiler takes the kernel. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.parametrize("backward", [False, True])
def test_the_kernels_compile(backward):
    pytest.importorskip("triton")
    from mambakit.training.distributed import segment_gpu as gpu

    types = dict.fromkeys(("x", "delta", "V", "z"), "*bf16") | dict.fromkeys(
        ("A", "bias", "between", "shares"), "*fp32"
    )
    flags = {"HAS_BIAS": True, "SOFTPLUS": True}
    compile_for_hopper(
        gpu._share_kernel,
        {**flags, "T": 1024, "BACKWARD": backward, "HAS_Z": backward, "HAS_EDGE": True, "BD": 32, "BN": 16},
        edge="*i32",
        **types,
    )
    compile_for_hopper(
        gpu._sums_kernel,
        {**flags, "T": 1024, "HAS_START": not backward, "ROWS": 32, "BD": 64},
        delta="*bf16", bias="*fp32", edge="*i32", sums="*fp32",
    )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    check("cuda", dtype)


def spread_on_a_gpu(length: int):
    """A float32 model over two processes that share one GPU."""
    import mambakit

    torch.manual_seed(0)
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2)).cuda()
    ids = torch.randint(0, 97, (1, length + 1), device="cuda")
    if dist.is_initialized():
        context_parallel(model, dist.group.WORLD)
        part = stretch(length, dist.get_rank(), dist.get_world_size())
    else:
        part = slice(0, length)
    logits = model(ids[:, :-1][:, part], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:][part], reduction="sum") / length
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.cuda
def test_context_parallel_on_a_gpu():
    expected = spread_on_a_gpu(1001)
    found = launch(spread_on_a_gpu, 2, 1001)[0]
    for name, wanted in expected.items():
        assert worst(torch.from_numpy(found[name]), torch.from_numpy(wanted)) < 1e-3, name
