"""Lists of launches: what the native library hands to the driver and to cuBLAS, beside the items one by one."""

from __future__ import annotations

import ctypes

import pytest
import torch

pytest.importorskip("triton")

from mambakit.ops._backends import cublas, launch_list, native, nvrtc
from mambakit.ops._backends.launch_list import HostItem, LaunchList, Matrix, Place, Product, Zeros, structure_item
from mambakit.ops._backends.structures import structure
from tests.ops.fused_mixer import plans_on_cpu
from tests.ops.fused_mixer.plans_on_cpu import Driver, PlacedKernel

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not installed")
Fields = structure("Fields", "a b", "count", "scale")


def add(grid: int, threads: int, stream: int, fields) -> None:
    """b += scale * a"""
    f = Fields.from_address(ctypes.addressof(fields))
    a, b = ((ctypes.c_float * f.count).from_address(at) for at in (f.a, f.b))
    for i in range(f.count):
        b[i] += f.scale * a[i]


@pytest.fixture
def listed(monkeypatch, tmp_path):
    plans_on_cpu.install(monkeypatch, tmp_path)
    Driver.errors.clear()
    yield
    assert Driver.errors == []
    plans_on_cpu.forget()


def both(items, arrays: list, dtype=torch.float32) -> tuple[list, list]:
    """The arrays after one call into C++, and after the items one by one."""
    found = []
    for one_by_one in (False, True):
        copies = [None if t is None else t.clone() for t in arrays]
        work = LaunchList(items, len(arrays), dtype, 0)
        assert work._words is not None
        if one_by_one:
            work._words = None
        Driver.made.clear()
        work(copies)
        assert bool(Driver.made) != one_by_one
        found.append(copies)
    return found[0], found[1]


def test_kernels_and_zeros(listed):
    kernel = PlacedKernel(add, 0)
    fields = Fields(a=1, b=2, count=3, scale=0.5)
    items = [
        structure_item(kernel, 1, 32, fields, {"a": Place(0, 4), "b": Place(2) + 8}),
        structure_item(kernel, 1, 32, fields, {"a": Place(2, 8), "b": Place(2)}),
        Zeros(Place(2, 12), 8),
    ]
    a = torch.arange(5.0)
    native_, python = both(items, [a, None, torch.ones(6)])
    assert native_[2].tolist() == [1.75, 2, 2.75, 0, 0, 1]
    assert torch.equal(native_[2], python[2])
    assert native_[0].tolist() == a.tolist()


def test_an_absent_address_is_null(listed):
    seen = []
    kernel = PlacedKernel(lambda grid, threads, stream, f: seen.append(Fields.from_address(ctypes.addressof(f)).b), 0)
    work = LaunchList(
        [structure_item(kernel, 1, 32, Fields(a=1, b=2), {"a": Place(0), "b": None})], 1, torch.float32, 0
    )
    work([torch.ones(2)])
    work._words = None
    work([torch.ones(2)])
    assert seen == [None, None]


MATRICES = {
    "plain": (Matrix(0, (5, 3), (3, 1)), Matrix(1, (3, 4), (4, 1)), Matrix(2, (5, 4), (4, 1))),
    "rows of a wider one": (Matrix(0, (5, 3), (7, 1), 2), Matrix(1, (3, 4), (6, 1), 1), Matrix(2, (5, 4), (9, 1), 3)),
    "weight": (Matrix(0, (5, 3), (3, 1)), Matrix(1, (4, 3), (3, 1)).t, Matrix(2, (5, 4), (4, 1))),
    "gradient": (Matrix(0, (5, 3), (6, 1), 1).t, Matrix(1, (5, 4), (4, 1)), Matrix(2, (3, 4), (4, 1))),
    "both": (Matrix(0, (5, 3), (3, 1)).t, Matrix(1, (4, 5), (5, 1)).t, Matrix(2, (3, 4), (4, 1))),
    "one row": (Matrix(0, (1, 3), (3, 1)), Matrix(1, (4, 3), (3, 1)).t, Matrix(2, (1, 4), (4, 1))),
    "rank one": (Matrix(0, (5, 1), (7, 1)), Matrix(1, (4, 1), (1, 1)).t, Matrix(2, (5, 4), (4, 1))),
    "one column": (Matrix(0, (5, 3), (3, 1)), Matrix(1, (1, 3), (3, 1)).t, Matrix(2, (5, 1), (1, 1))),
    "outer, of one row": (Matrix(0, (1, 3), (3, 1)).t, Matrix(1, (1, 4), (4, 1)), Matrix(2, (3, 4), (4, 1))),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(name, dtype, accumulate, listed):
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randint(-4, 5, (60,), generator=generator).to(dtype) for _ in range(3)]  # so that sums are exact
    a, b, out = (m.of(arrays).double() for m in MATRICES[name])
    item = Product(*MATRICES[name], dtype, dtype, False, accumulate)
    for found in both([item], arrays, dtype):
        assert torch.equal(MATRICES[name][2].of(found).double(), a @ b + (out if accumulate else 0))
        rest = torch.ones(60, dtype=torch.bool)
        MATRICES[name][2]._replace(array=0).of([rest]).fill_(False)
        assert torch.equal(found[2][rest], arrays[2][rest])
    assert not accumulate or torch.equal(found[0], arrays[0])


@pytest.mark.parametrize("allowed", [True, False, (True, True), (False, True)])
def test_torchs_choice_of_sums_in_half(allowed, listed, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_cublas_allow_bf16_reduced_precision_reduction", lambda: allowed)
    work = LaunchList([Product(*MATRICES["plain"], torch.bfloat16, torch.float32, False)], 3, torch.bfloat16, 0)
    a, b, out = torch.ones(60, dtype=torch.bfloat16), torch.ones(60, dtype=torch.bfloat16), torch.zeros(60)
    work([a, b, out])
    assert out[:20].tolist() == [3.0] * 20
    asked = allowed in (True, (True, True))
    assert Driver.made == (["product"] if asked else ["math mode 16", "product", "math mode 0"])
    assert cublas.math_mode(torch.float32) == -1


def test_a_thread_without_a_context_gets_one_and_other_errors_raise(listed, monkeypatch):
    contexts: list[int] = []
    monkeypatch.setattr(nvrtc, "use_context", contexts.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(nvrtc, "error_name", lambda code: f"CODE {code}")
    kernel = PlacedKernel(add, 0)
    item = structure_item(kernel, 1, 32, Fields(count=2, scale=1), {"a": Place(0), "b": Place(1)})
    work = LaunchList([item, item], 2, torch.float32, 0)
    for failures in ([nvrtc.INVALID_CONTEXT], []):
        Driver.failures[:] = failures
        a, b = torch.ones(2), torch.zeros(2)
        work([a, b])
        assert b.tolist() == [2, 2]  # each launch once
    assert contexts == [3]
    for failures in ([nvrtc.INVALID_CONTEXT, 700], [700]):
        Driver.failures[:] = failures
        with pytest.raises(RuntimeError, match="kernel launch failed: CODE 700"):
            work([torch.ones(2), torch.zeros(2)])
    product = Product(*MATRICES["plain"], torch.float32, torch.float32, False)
    work = LaunchList([product], 3, torch.float32, 0)
    Driver.failures[:] = [14]
    with pytest.raises(RuntimeError, match="cuBLAS failed with status 14"):
        work([torch.ones(60)] * 3)


class Doubled(HostItem):
    """The second array's numbers, doubled by torch."""

    def run(self, stream, arrays, at):
        Driver.made.append("torch")
        assert at == [t.data_ptr() for t in arrays]
        arrays[1].mul_(2)


@pytest.mark.parametrize("order", ["adaaad", "daad", "dd", "aad", "ad"])
def test_what_python_enqueues_keeps_its_place(order, listed):
    kernel = PlacedKernel(add, 0)
    launch = structure_item(kernel, 1, 32, Fields(count=2, scale=1), {"a": Place(0), "b": Place(1)})
    work = LaunchList([launch if each == "a" else Doubled() for each in order], 2, torch.float32, 0)
    want = torch.ones(2)
    for each in order:
        want = want + torch.tensor([1.0, 3.0]) if each == "a" else want * 2
    for _ in range(2):
        Driver.made.clear()
        arrays = [torch.tensor([1.0, 3.0]), torch.ones(2)]
        work(arrays)
        assert torch.equal(arrays[1], want)
        assert Driver.made == ["launch" if each == "a" else "torch" for each in order]


def test_a_failure_between_python_items(listed, monkeypatch):
    """After a context is made, the run of items that failed goes on to its own end and no further."""
    monkeypatch.setattr(nvrtc, "use_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = PlacedKernel(add, 0)
    launch = structure_item(kernel, 1, 32, Fields(count=2, scale=1), {"a": Place(0), "b": Place(1)})
    work = LaunchList([launch, launch, Doubled(), launch], 2, torch.float32, 0)
    Driver.failures[:] = [nvrtc.INVALID_CONTEXT]
    arrays = [torch.ones(2), torch.zeros(2)]
    work(arrays)
    assert arrays[1].tolist() == [5, 5]


def test_sizes_of_more_than_32_bits_are_torchs(listed):
    huge = Matrix(0, (2**31, 3), (3, 1)), Matrix(1, (3, 4), (4, 1)), Matrix(2, (2**31, 4), (4, 1))
    assert LaunchList([Product(*huge, torch.float32, torch.float32, False)], 3, torch.float32, 0)._words is None


def test_without_the_library_or_cublas_items_run_one_by_one(monkeypatch):
    launch_list._functions.cache_clear()
    monkeypatch.setattr(cublas, "functions", lambda: None)
    assert LaunchList([Zeros(Place(0), 8)], 1, torch.float32, 0)._words is None
    launch_list._functions.cache_clear()
    monkeypatch.setattr(cublas, "functions", lambda: (1, 2))
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert LaunchList([Zeros(Place(0), 8)], 1, torch.float32, 0)._words is None
    launch_list._functions.cache_clear()


def test_where_torch_has_no_cuda_there_is_no_cublas():
    if torch.version.cuda is None:
        assert cublas.functions() is None
    else:
        product, mode = cublas.functions()
        assert product
        assert mode
