"""The Triton sampling kernel against the float64 reference: on a GPU, and in Triton's interpreter."""

import math

import pytest
import torch

compiler = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambakit.ops.sampling import reference, triton  # noqa: E402
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted  # noqa: E402
from tests.ops.sampling.test_sampling import FILTERS, logits_of, parameters, uniform  # noqa: E402

SIZES = [1, 60, 4096, 20_000] if INTERPRETED else [1, 60, 4096, 20_000, 50_280, 65_024]


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_draws_what_the_reference_draws(device, v):
    """Every filter in one call: rows do not share one."""
    copies = 1 if INTERPRETED else 8
    b = copies * len(FILTERS)
    p = torch.cat([parameters(copies, **values) for values in FILTERS])
    logits, u = logits_of(b, v, v), uniform(b, v)
    got = triton.sample(logits.to(device), u.to(device), p.to(device)).cpu()
    expected = reference.sample(logits, u, p)
    wrong = (got != expected).nonzero()[:, 0].tolist()
    # Sums of 50,000 float32 numbers are off by 1e-6 of the mass, so a number sometimes falls beyond a boundary.
    assert len(wrong) <= b // 64, [(FILTERS[i // copies], got[i], expected[i]) for i in wrong]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_ends_and_no_numbers(device, dtype):
    nan, inf = math.nan, math.inf
    rows = [[1.0, nan], [nan, nan], [-inf, -inf], [inf, 0.0], [-inf, 1.0], [0.0, 0.0], [0.0, -inf]]
    logits = torch.tensor(rows, dtype=dtype, device=device)
    u = torch.full((7,), math.nextafter(1.0, 0.0), dtype=torch.float64, device=device)
    sampled = triton.sample(logits, u, parameters(7).to(device))
    assert sampled.tolist() == [-1, -1, -1, -1, 1, 1, 0]
    greedy = triton.sample(logits, u, parameters(7, temperature=0).to(device))
    assert greedy.tolist() == [-1, -1, -1, 0, 1, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_depends_on_itself_alone(device):
    v, b = 3001, len(FILTERS)
    logits, u = logits_of(b, v).to(device), uniform(b).to(device)
    p = torch.cat([parameters(1, **values) for values in FILTERS]).to(device)
    together = triton.sample(logits, u, p)
    for i in range(b):
        assert torch.equal(triton.sample(logits[i : i + 1].clone(), u[i : i + 1], p[i : i + 1])[0], together[i])


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("logits", ["*fp32", "*bf16", "*fp16"])
def test_compiles(logits):
    kinds = {"logits": logits, "row_stride": "i32", "uniform": "*fp64", "parameters": "*fp32", "tokens": "*i64"}
    constants = {"V": 50_280, "LANES": reference.LANES, "DEPTH": 16}
    source = ASTSource(triton._sample, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
