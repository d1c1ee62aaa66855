"""The CUDA C++ kernels' logic without a GPU: compiled for the CPU (`cuda_on_cpu.py`), against the float64 chunked.

The full list of shapes is `test_cuda.CASES`, which the GPU runs; here are the ones that differ most, few because each
compiles.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambakit.ops.selective_scan import chunked, cuda, cuda_backward, cuda_forward, cuda_launch, cuda_split_scan
from mambakit.ops.selective_scan import plan as plans
from tests.ops.closeness import relative_error
from tests.ops.selective_scan import cuda_on_cpu, test_cuda

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")
F32, BF16 = torch.float32, torch.bfloat16
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def on_cpu(monkeypatch, tmp_path_factory):
    cuda_on_cpu.forget()
    cuda_on_cpu.install(monkeypatch, tmp_path_factory.getbasetemp())
    yield
    cuda_on_cpu.forget()


CASES = [
    (1, 75, 40, 16, F32, [0, 3, 40, 1, 0, 0, 31], True, False),
    (1, 300, 24, 16, BF16, None, True, True),  # several chunks
    (2, 33, 9, 3, F32, None, False, True),  # no whole vector
    (2, 41, 20, 16, BF16, None, True, False),  # whole vectors of four, not of eight
]


@pytest.mark.parametrize("case", CASES, ids=test_cuda.name_of)
def test_against_the_float64_reference(on_cpu, case):
    assert not test_cuda.failures(case, test_cuda.errors(case, device="cpu", interval=32))


@pytest.mark.parametrize("layout", range(len(plans._LAYOUTS)))
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_every_layout_whole_and_cut(on_cpu, monkeypatch, layout, cut):
    offered = [plan for _, plan in plans._timed(1, 300, 40, 132, plans._LAYOUTS[layout])]
    plan = next(plan for plan in offered if (plan.chunks > 1) == cut)
    monkeypatch.setattr(cuda_forward, "forward_plan", lambda *_: plan)
    case = (1, 300, 40, 16, F32, None, True, False)
    arguments, _, _ = test_cuda.make(case, "cpu")
    expected = chunked.forward(*map(test_cuda.exact, arguments), 64)
    for ours, theirs in zip(cuda.forward(*arguments, 64), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


CHAINED = [(2, 300, 40, 16, F32, None, True, False), (1, 200, 130, 16, BF16, None, True, True)]


@pytest.mark.parametrize("case", CHAINED, ids=test_cuda.name_of)
@pytest.mark.parametrize("layout", range(len(plans._LAYOUTS)))
def test_a_chained_scan_has_the_bits_of_a_whole_row(on_cpu, monkeypatch, layout, case):
    """All CTAs are resident and later ones run first, so that they wait for their carry."""
    _, length, _, n, *_ = case
    arguments, dy, dfinal = test_cuda.make(case, "cpu")
    found = []
    for resident in (0, 2):
        forward = plans._LAYOUTS[layout].plan._replace(chunks=4 if resident else 1, resident=resident)
        backward = plans.backward_plan(16, length, 4096, n, 132, 227 * 1024)
        backward = backward._replace(chunks=4 if resident else 1, resident=resident)
        monkeypatch.setattr(cuda_forward, "forward_plan", lambda *_, plan=forward: plan)
        monkeypatch.setattr(cuda_backward, "backward_plan", lambda *_, plan=backward: plan)
        cuda_on_cpu.forget()
        y, final, checkpoints = cuda.forward(*arguments, 32)
        found.append((y, final, checkpoints, *cuda.backward(dy, dfinal, *arguments, checkpoints, 32)))
    names = ("y", "final", "checkpoints", *test_cuda.OUTPUTS[2:])
    for name, whole, chained in zip(names, *found, strict=True):
        if name in ("dA", "dD", "dbias"):  # summed for every chunk, then over chunks
            assert relative_error(chained, whole.double()) < 2e-6
        else:
            assert torch.equal(whole, chained), name


def test_a_chained_scan_where_rows_fill_the_card_unevenly():
    choose = {
        "forward": plans.forward_plan.__wrapped__,
        "backward": lambda *shape: plans.backward_plan.__wrapped__(*shape, 227 * 1024),
    }
    shapes = {
        True: [(4, 4096, 5120), (12, 2048, 1536)],
        False: [(16, 2048, 1536), (8, 2048, 4096), (1, 32768, 4096), (1, 1, 5120)],
    }
    for uneven, every in shapes.items():
        for kind, (b, length, d) in itertools.product(choose, every):
            plan = choose[kind](b, length, d, 16, 132)
            assert (plan.resident > 0) == uneven, (kind, b, length, d)
            if uneven:
                assert plan.resident * 132 < b * -(-d // plan.cta_channels)
                assert 2 <= plan.chunks <= length // 64
                taken = plan.backward_bytes if kind == "backward" else plan.chained_bytes(227 * 1024)
                assert plan.resident * (taken + 1024) <= 228 * 1024 < (plan.resident + 1) * (taken + 1024)


def test_threads_of_transposed_inputs_have_half_of_the_states():
    for shape in ((4, 2048, 1536), (1, 197, 384), (4, 4096, 5120)):
        assert plans.forward_plan(*shape, 16, 132, transposed=True).lanes == 2
    assert plans.forward_plan(4, 2048, 1536, 16, 132).lanes == 1


def test_no_warps_without_channels():
    """More than a sixth of them; few of many channels stay in large CTAs, and shared memory is large enough for all."""
    for d, forward, backward in ((48, 1, 3), (16, 1, 1), (24, 2, 2), (100, 2, 4), (192, 2, 4), (1536, 2, 4)):
        plan = plans.forward_plan(32, 4096, d, 16, 132, transposed=True)
        assert plan.warps == forward, d
        assert plan.min_ctas * plan.warps <= 16
        plan = plans.backward_plan(32, 4096, d, 16, 132, 227 * 1024)
        assert plan.warps == backward, d
        assert plan.min_ctas * (plan.backward_bytes + 1024) <= 228 * 1024
        assert 6 * -(-d // plan.cta_channels) * plan.cta_channels <= 8 * max(d, 16), d


def test_packed_rows_and_split_scans_are_not_chained(on_cpu, monkeypatch):
    whole = plans.forward_plan(4, 4096, 5120, 16, 132, False)
    assert (whole.chunks, whole.resident, whole.round, whole.min_ctas) == (1, 0, 16, 6)
    assert plans.backward_plan(4, 4096, 5120, 16, 132, 227 * 1024, False).resident == 0
    asked = []
    for module, name, at in ((cuda_forward, "forward_plan", 5), (cuda_backward, "backward_plan", 6)):
        chosen = getattr(plans, name)
        ask = lambda *shape, chosen=chosen, at=at: asked.append(shape[at]) or chosen(*shape)  # noqa: E731
        monkeypatch.setattr(module, name, ask)
    for packed, split in ((False, False), (True, False), (False, True)):
        common = (4, 4096, 5120, 16, BF16, True, True, packed, 4, None, 64)
        forward = cuda_forward.forward_kernel(*common, False, split)
        backward = cuda_backward.backward_kernel(*common, split)
        assert forward.chained == backward.chained == (not packed and not split)
    assert asked == [True, True, False, False, False, False]


def test_tokens_too_far_apart_for_the_kernels_are_copied(on_cpu, monkeypatch):
    b, length, d = 2, 5, 24
    u = torch.randn(b, length, d)
    B, apart = torch.randn(b, length, 16), torch.full((b, length, 2 * d), 7.0)
    apart[..., :d] = u
    monkeypatch.setattr(cuda_launch, "_FARTHEST", 2 * d)
    operands = cuda_launch.operands(d, 16, 4, B, B, u=u, z=apart[..., :d])
    assert (operands.fields["u_t"], operands.fields["z_t"]) == (d, d)  # the second one is a copy
    assert torch.equal(operands.tensors[1], u)
    assert operands.tensors[0] is u
    monkeypatch.setattr(cuda_launch, "_FARTHEST", 2 * d + 1)
    assert cuda_launch.operands(d, 16, 4, B, B, u=apart[..., :d]).fields["u_t"] == 2 * d


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_the_sum_of_many_tokens_in_dD(on_cpu, monkeypatch, multiprocessors):
    """Half of what a sum in one float32 loses: 2e-7 here, where the terms themselves are off by 6e-8."""
    monkeypatch.setattr(cuda_launch, "multiprocessors", lambda device: multiprocessors)
    arguments, dy, _ = test_cuda.make((1, 4096, 64, 16, BF16, None, True, False), "cpu")
    u, z = arguments[0].double(), arguments[6].double()
    expected = (dy.double() * z * torch.sigmoid(z) * u).sum((0, 1))
    checkpoints = cuda.forward(*arguments, 64)[2]
    dD = cuda.backward(dy, None, *arguments, checkpoints, 64)[5]
    assert relative_error(dD, expected) < 1.1e-7


def test_the_gradient_of_the_gate_into_given_memory(on_cpu):
    case = CASES[1]
    arguments, dy, _ = test_cuda.make(case, "cpu")
    *_, checkpoints = cuda.forward(*arguments, 64)
    wide = torch.full((*dy.shape[:2], 2 * dy.shape[2]), 7.0, dtype=dy.dtype)
    kept, dz = wide.chunk(2, -1)
    found = cuda.backward(dy, None, *arguments, checkpoints, 64, dz)
    assert found[6] is dz
    assert (kept == 7).all()
    for ours, theirs in zip(found, cuda.backward(dy, None, *arguments, checkpoints, 64), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kilobytes", "most"), [(227, 256), (163, 128), (99, 64)], ids=["Hopper", "A100", "Ada"])
def test_gradients_of_many_states_go_where_shared_memory_suffices(on_cpu, monkeypatch, kilobytes, most):
    if most < 256:
        pytest.importorskip("triton")
    monkeypatch.setattr(cuda.nvrtc, "shared_memory", lambda device: kilobytes * 1024)
    cuda._slower.cache_clear()
    u = torch.zeros(2, 300, 64)
    for n in (1, 4, 8, 16, 32, 64, 128, 256):
        A = torch.zeros(64, n)
        assert cuda.other_implementation(u, A) is None  # forward needs less
        if n <= most:
            assert cuda._other_gradient(u, A) is None
            continue
        with pytest.warns(
            UserWarning, match=f"slower Triton kernels: the gradient of {n} states takes .* shared memory"
        ):
            assert cuda._other_gradient(u, A).__name__.endswith("selective_scan.triton")
    if most < 256:
        with pytest.raises(RuntimeError, match="gradient of 256 states in a row .* shared memory, .* whole rows"):
            cuda_backward.backward_kernel(2, 300, 64, 256, F32, True, True, False, 4, None, 64, True)


def test_what_neither_cuda_nor_triton_serves_runs_in_plain_pytorch_with_a_warning(on_cpu, monkeypatch):
    b, length, d, n = 2, 9, 64, 4
    u, A, rows = torch.zeros(b, length, d), torch.zeros(d, n), torch.zeros(b, length, n)
    others = {
        "groups": (u, torch.zeros(b, length, 2, n), rows, None),
        "constants": (u, torch.zeros(1, 1, d, n), rows, None),
        "dtypes": (u.bfloat16(), rows, rows, None),
    }

    def warned(operands, states=A):
        cuda._plain.cache_clear()
        with pytest.warns(UserWarning, match=f"plain PyTorch, which is many times slower: {reason}"):
            assert cuda.other_implementation(u, states, *operands) is chunked

    reason = "A has 300 states"
    wide = torch.zeros(b, length, 300)
    warned((u, torch.zeros(b, length, 2, 300), wide, None), torch.zeros(d, 300))
    monkeypatch.setattr(cuda.nvrtc, "available", lambda: "NVRTC cannot be loaded")
    reason = "NVRTC cannot be loaded"
    for operands in others.values():
        warned(operands)
    assert cuda.other_implementation(u, A, *others["groups"]) is chunked  # once for a reason
    monkeypatch.setattr(cuda.nvrtc, "available", lambda: None)
    monkeypatch.setattr(cuda.nvrtc, "shared_memory", lambda device: 99 * 1024)
    reason = "the gradient of 256 states"
    wide, A256 = torch.zeros(b, length, 256), torch.zeros(d, 256)
    cuda._plain.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        assert cuda._other_gradient(u, A256, u, torch.zeros(b, length, 2, 256), wide, None) is chunked


def test_registers_are_left_to_as_many_ctas_as_fit():
    def plan(n, shared):
        return plans.backward_plan(16, 2048, 1536, n, 132, shared * 1024)

    assert [plan(n, 227).min_ctas for n in (8, 16, 32)] == [2, 3, 2]
    assert [plan(16, shared).min_ctas for shared in (163, 99)] == [2, 1]
    forward = {
        shape: plans.forward_plan(*shape, 16, 132) for shape in [(16, 2048, 1536), (1, 32768, 4096), (4, 4096, 5120)]
    }
    assert [p.min_ctas for p in forward.values()] == [6, 4, 6]
    assert [(p.chunks, p.resident, p.round) for p in forward.values()] == [(1, 0, 16), (5, 0, 16), (4, 4, 32)]
    assert plans.backward_plan(8, 2048, 4096, 16, 132, 227 * 1024).save == 4
    assert plans.backward_plan(8, 2048, 4096, 16, 132, 99 * 1024).save == 8


def read_within_bounds(folder: str, case: tuple, before: bool) -> None:
    """Every input beside memory that cannot be read: a read outside of one ends the process."""
    with pytest.MonkeyPatch.context() as patch:
        cuda_on_cpu.install(patch, Path(folder))
        patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        arguments, dy, dfinal = test_cuda.make(case, "cpu")
        place = lambda t: cuda_on_cpu.guarded(t, before) if torch.is_tensor(t) else t  # noqa: E731
        arguments, dy, dfinal = tuple(map(place, arguments)), place(dy), place(dfinal)
        *inputs, initial, cu_seqlens = arguments
        *_, checkpoints = cuda.forward(*arguments, 64)
        cuda.backward(dy, dfinal, *arguments, place(checkpoints), 64)
        *_, checkpoints = cuda_split_scan.Forward(*inputs, cu_seqlens, 64).finish(initial)
        cuda_split_scan.Backward(dy, *inputs, initial, cu_seqlens, place(checkpoints), 64).finish(dfinal)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("case", [CASES[0], (2, 300, 24, 16, BF16, None, True, False)], ids=test_cuda.name_of)
def test_nothing_is_read_outside_of_the_inputs(case, before, tmp_path_factory):
    code = f"from {__name__} import *; read_within_bounds({str(tmp_path_factory.getbasetemp())!r}, {case}, {before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-3000:]}"


def test_in_place_with_slots(on_cpu):
    (u, delta, A, B, C, D, z, bias, *_), _, _ = test_cuda.make((3, 5, 40, 16, F32, None, True, False), "cpu")
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    ours = torch.randn(5, 40, 16)
    theirs = ours.clone()
    y = cuda.forward_(ours, slots, u, delta, A, B, C, D, z, bias, True, None)
    want = chunked.forward_(theirs, slots, u, delta, A, B, C, D, z, bias, True, None)
    assert relative_error(y, want) < 1e-5
    assert relative_error(ours, theirs) < 1e-5
