"""The CUDA C++ scan against the float64 reference: outputs, all gradients and states, on edge-case shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from mambakit.ops.selective_scan import chunked, cuda, cuda_backward, cuda_forward, plan
from tests.ops.closeness import relative_error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# float32 arithmetic over hundreds of tokens; a half-precision result is rounded once more, which alone is 1.7e-3
# (bfloat16).
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# b, l, d, n, dtype, packed lengths, optional arguments, strided: one token, tile and chunk edges (8, 32, 64, 128
# tokens), widths off the tile and off the vector width, chunked rows (long and narrow), every number of lanes and of
# states
CASES = [
    (1, 1, 1, 1, F32, None, True, False),
    (3, 1, 24, 16, F32, None, True, False),
    (64, 1, 1536, 16, BF16, None, True, True),
    (2, 2, 20, 16, F32, None, True, False),
    (2, 7, 64, 16, F32, None, True, True),
    (2, 8, 64, 16, F32, None, True, False),
    (2, 9, 65, 16, F32, None, True, False),
    (1, 31, 16, 16, F32, None, True, False),
    (1, 32, 16, 16, F32, None, True, False),
    (1, 33, 16, 16, F32, None, True, True),
    (2, 64, 130, 16, F32, None, True, False),
    (2, 65, 96, 16, F32, None, False, False),
    (1, 127, 40, 16, F32, None, True, False),
    (1, 128, 40, 16, F32, None, True, True),
    (1, 129, 41, 16, F32, None, True, False),
    (3, 200, 100, 16, F32, None, True, False),
    (1, 257, 64, 16, F32, None, True, False),
    (1, 1000, 64, 16, F32, None, True, True),
    (2, 1025, 50, 16, F32, None, True, False),
    (1, 3000, 48, 16, F32, None, False, False),
    (1, 4096, 64, 16, F32, None, True, False),
    (2, 130, 24, 8, F32, None, True, False),
    (1, 700, 32, 8, BF16, None, True, False),
    (2, 75, 24, 4, F32, None, True, False),
    (2, 75, 33, 3, F32, None, True, False),
    (1, 600, 24, 2, F32, None, False, False),
    (2, 70, 20, 13, F32, None, True, True),
    (1, 140, 24, 32, F32, None, True, False),
    (1, 140, 20, 64, F32, None, True, True),
    (1, 700, 16, 64, BF16, None, True, False),
    (2, 40, 12, 100, F32, None, True, False),
    (1, 100, 9, 256, F32, None, True, False),
    (1, 600, 8, 200, F32, None, True, False),
    (2, 300, 256, 16, BF16, None, True, True),
    (2, 300, 256, 16, BF16, None, False, False),
    (1, 2050, 160, 16, BF16, None, True, True),
    (4, 513, 1536, 16, BF16, None, True, True),
    (2, 300, 100, 16, F16, None, True, True),
    (1, 1500, 64, 16, F16, None, False, False),
    (1, 5, 24, 16, F32, [5], True, False),
    (1, 3, 24, 16, F32, [0, 3], True, False),
    (1, 75, 40, 16, F32, [0, 3, 40, 1, 0, 0, 31], True, False),
    (1, 1200, 40, 16, F32, [1, 0, 127, 128, 0, 1, 500, 8, 24, 411, 0], True, True),
    (1, 1024, 64, 16, F32, [64] * 16, True, False),
    (1, 2000, 64, 16, F32, [1] * 500 + [1500], False, False),
    (1, 1024, 128, 16, BF16, [256, 0, 768], True, True),
    (1, 300, 24, 8, F32, [100, 0, 200], True, False),
    (1, 300, 24, 64, F32, [33, 267], True, False),
    (1, 260, 9, 200, F32, [33, 0, 227], True, False),
]  # fmt: skip


def name_of(case):
    b, length, d, n, dtype, lengths, full, strided = case
    marks = (["packed"] if lengths else []) + ([] if full else ["bare"]) + (["strided"] if strided else [])
    return "-".join([f"{b}x{length}x{d}x{n}", str(dtype)[6:], *marks])


def make(case, device="cuda", seed=0):
    """(arguments of forward without the interval, dy, dfinal)."""
    b, length, d, n, dtype, lengths, full, strided = case
    generator = torch.Generator(device).manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    if strided:
        rest = 4 if d % 8 == 0 else 5  # rows that allow and that forbid wide loads
        wide = randn(b, length, 3 * d + 2 * n + rest).to(dtype)
        u, delta, z, B, C, _ = wide.split([d, d, d, n, n, rest], -1)
    else:
        u, delta, z = (randn(b, length, d).to(dtype) for _ in range(3))
        B, C = (randn(b, length, n).to(dtype) for _ in range(2))
    if not full:
        delta = delta.abs() * 0.3
    A = -torch.rand(d, n, device=device, generator=generator) * 4
    s = b if lengths is None else len(lengths)
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    D, bias, initial = (randn(d), randn(d), randn(s, d, n)) if full else (None, None, None)
    arguments = (u, delta, A, B, C, D, z if full else None, bias, full, initial, cu)
    return arguments, randn(b, length, d).to(dtype), randn(s, d, n) if full else None


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def poison(device="cuda"):
    """Leave NaN in the memory that the next allocations get."""
    if device != "cuda":
        return
    blocks = [
        torch.full((size,), float("nan"), device=device) for size in (2**22, 2**18, 2**14, 2**10) for _ in range(8)
    ]
    del blocks


OUTPUTS = ("y", "final", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial")


def errors(case, implementation=cuda, device="cuda", interval=128):
    """Each output's relative error against the float64 chunked."""
    arguments, dy, dfinal = make(case, device)
    doubles = tuple(map(exact, arguments))
    expected = chunked.forward(*doubles, interval)
    gradients = chunked.backward(exact(dy), exact(dfinal), *doubles, expected[2], interval)
    poison(device)
    y, final, checkpoints = implementation.forward(*arguments, interval)
    poison(device)
    got = implementation.backward(dy, dfinal, *arguments, checkpoints, interval)
    pairs = zip(OUTPUTS, (y, final, *got), (*expected[:2], *gradients), strict=True)
    return {name: relative_error(a, e) if a.shape == e.shape else float("nan") for name, a, e in pairs}


def failures(case, found):
    limit = LIMITS[case[4]]
    # Results in float32 whatever the inputs are. The bound for half inputs is 3e-3; these stay near float32's, except
    # dA of long rows, where 1.2e-5 was seen (2050 tokens, bfloat16). Float32 inputs keep 1e-5 at every length.
    long_half = case[4] != F32 and case[1] >= 2000
    kept = {"final": 1e-5, "dA": 3e-5 if long_half else 1e-5, "dD": 1e-5, "dbias": 1e-5, "dinitial": 1e-5}
    return {name: error for name, error in found.items() if not error < kept.get(name, limit)}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_the_float64_reference(case):
    assert not failures(case, errors(case))


@pytest.mark.parametrize("interval", [32, 64, 256])
def test_checkpoint_intervals(interval):
    case = (2, 700, 48, 16, F32, None, True, False)
    assert not failures(case, errors(case, interval=interval))
    arguments, _, _ = make(case)
    checkpoints = cuda.forward(*arguments, interval)[2]
    assert relative_error(checkpoints, chunked.forward(*map(exact, arguments), interval)[2]) < 1e-5


@pytest.mark.parametrize("case", [CASES[20], CASES[35], CASES[42]], ids=name_of)
def test_same_inputs_same_bits(case):
    arguments, dy, dfinal = make(case)
    runs = []
    for _ in range(3):
        poison()
        y, final, checkpoints = cuda.forward(*arguments, 128)
        runs.append((y, final, *cuda.backward(dy, dfinal, *arguments, checkpoints, 128)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("layout", [0, 1])
def test_a_chained_scan_has_the_bits_of_a_whole_row(monkeypatch, layout):
    arguments, dy, dfinal = make((4, 320, 5120, 16, BF16, None, True, False))
    found = []
    for resident in (0, 2, 2, 2):
        forward = plan._LAYOUTS[layout].plan._replace(chunks=5 if resident else 1, resident=resident)
        backward = plan.backward_plan(16, 640, 4096, 16, 132, 227 * 1024)
        backward = backward._replace(chunks=5 if resident else 1, resident=resident)
        monkeypatch.setattr(cuda_forward, "forward_plan", lambda *_, plan=forward: plan)
        monkeypatch.setattr(cuda_backward, "backward_plan", lambda *_, plan=backward: plan)
        cuda_forward.forward_kernel.cache_clear()
        cuda_backward.backward_kernel.cache_clear()
        poison()
        y, final, checkpoints = cuda.forward(*arguments, 64)
        found.append((y, final, *cuda.backward(dy, dfinal, *arguments, checkpoints, 64)))
    cuda_forward.forward_kernel.cache_clear()
    cuda_backward.backward_kernel.cache_clear()
    for name, whole, *chained in zip(OUTPUTS, *found, strict=True):
        if name in ("dA", "dD", "dbias"):  # summed for every chunk, then over chunks
            assert relative_error(chained[0], whole.double()) < 2e-6
            assert all(torch.equal(chained[0], again) for again in chained[1:]), name
        else:
            assert all(torch.equal(whole, again) for again in chained), name


@pytest.mark.parametrize("length", [1, 5, 700])
def test_in_place_with_slots(length):
    (u, delta, A, B, C, D, z, bias, *_), _, _ = make((3, length, 40, 16, F32, None, True, True))
    pool = torch.randn(5, 40, 16, device="cuda")
    for slots in (torch.tensor([4, -1, 0], dtype=torch.int32, device="cuda"), None):
        ours, theirs = pool.clone(), pool.clone()
        y = cuda.forward_(ours, slots, u, delta, A, B, C, D, z, bias, True, None)
        want = chunked.forward_(theirs, slots, u, delta, A, B, C, D, z, bias, True, None)
        assert relative_error(y, want) < 1e-5
        assert relative_error(ours, theirs) < 1e-5


def test_in_place_packed():
    lengths = [7, 0, 300, 1, 692]
    (u, delta, A, B, C, D, z, bias, _, _, cu), _, _ = make((1, 1000, 40, 16, F32, lengths, True, False))
    slots = torch.tensor([2, 0, -1, 5, 1], dtype=torch.int32, device="cuda")
    ours = torch.randn(6, 40, 16, device="cuda")
    theirs = ours.clone()
    y = cuda.forward_(ours, slots, u, delta, A, B, C, D, z, bias, True, cu)
    want = chunked.forward_(theirs, slots, u, delta, A, B, C, D, z, bias, True, cu)
    assert relative_error(y, want) < 1e-5
    assert relative_error(ours, theirs) < 1e-5


def test_captured_in_a_graph():
    case = (1, 1000, 64, 16, BF16, [600, 0, 400], True, True)
    arguments, dy, dfinal = make(case)

    def run():
        y, final, checkpoints = cuda.forward(*arguments, 128)
        return (y, final, *cuda.backward(dy, dfinal, *arguments, checkpoints, 128))

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_decays_near_one_over_a_long_row():
    """delta |A| about 1e-7: no worse than a float32 token-by-token loop, whose last state 2^20 additions round."""
    length, d = 2**20, 4
    u = torch.ones(1, length, d, device="cuda")
    delta = torch.full((1, length, d), 1e-7, device="cuda")
    A = -torch.ones(d, 16, device="cuda")
    B = C = torch.ones(1, length, 16, device="cuda")
    _, final, _ = cuda.forward(u, delta, A, B, C, None, None, None, False, None, None, 0)
    total = 1e-7 * torch.arange(length - 1, -1, -1, dtype=torch.float64)
    expected = (1e-7 * torch.exp(-total)).sum()
    assert abs(final.double().cpu() / expected - 1).max() < 1e-3  # 3.3e-5 was measured, a loop has 6.5e-3


def test_empty_inputs():
    (u, delta, A, B, C, D, z, bias, softplus, initial, _), _, _ = make((2, 5, 24, 16, F32, None, True, False))
    cut = lambda t: t[:, :0]  # noqa: E731
    y, final, _ = cuda.forward(cut(u), cut(delta), A, cut(B), cut(C), D, cut(z), bias, softplus, initial, None, 128)
    assert y.shape == (2, 0, 24)
    assert torch.equal(final, initial)
