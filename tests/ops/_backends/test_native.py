"""The library: what it says of itself, what happens without it, and in a forked child."""

from __future__ import annotations

import multiprocessing
import os
import warnings

import pytest
import torch

from mambakit.ops._backends import dispatch, native
from mambakit.ops.causal_conv1d import cpu as conv
from mambakit.ops.rms_norm import cpu as norm


def test_describe_and_use_isa(isa):
    report = native.describe()
    assert report["isa"] == isa
    assert os.path.isfile(str(report["path"]))
    with pytest.raises(ValueError, match="is not available here"):
        native.use_isa("mmx")


def test_without_the_library_plain_pytorch_serves_and_says_so_once(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: None)
    native.warn_missing.cache_clear()
    implementation = dispatch.choose(lambda: 1, lambda: 2, lambda: True)
    with pytest.warns(RuntimeWarning, match="Install a C\\+\\+ compiler"):
        assert implementation() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation() == 2
    assert native.describe()["isa"] is None


def test_float64_and_wide_filters_are_plain_pytorchs(isa):
    served = conv.serves
    x = torch.randn(1, 3, 2)
    assert served(x, torch.randn(2, 8), None, "", None, None)
    assert not served(x, torch.randn(2, 9), None, "", None, None)
    assert not served(x.double(), torch.randn(2, 4), None, "", None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes(isa):
    """In a small process: one that has run a thousand tests may be too large to be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.preloaded"])
    parent = context.Process(target=_compute_and_fork, args=(isa,))
    parent.start()
    parent.join(120)
    assert parent.exitcode == 0


def _compute_and_fork(isa: str) -> None:
    native.use_isa(isa)
    x = torch.randn(64, 512)
    arguments = (x, None, None, 1e-5, torch.float32, torch.float32)
    y, _ = norm.forward(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of fork() beside threads: that is what is tested
        child = os.fork()
    if child == 0:
        os._exit(0 if norm.forward(*arguments)[0].numpy().tobytes() == y.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_openmp_runtimes_are_found_where_wheels_of_torch_have_them(tmp_path):
    """PyTorch's aarch64 wheels keep libgomp beside the package: a second pool of threads would compete with it."""
    for name in ("torch/lib/libgomp-1.so", "torch.libs/libgomp-a49a47f9.so.1.0.0", "torch.libs/libopenblas.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = native._runtimes(tmp_path / "torch")
    assert [str(p.relative_to(tmp_path)) for p in found] == [
        "torch/lib/libgomp-1.so", "torch.libs/libgomp-a49a47f9.so.1.0.0",
    ]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux says what its processor has")
def test_every_instruction_set_of_this_processor_is_used():
    """The library asks the processor: with some toolchains a compiler says no to all, and the slowest kernels serve."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    if not flags:
        pytest.skip("not x86")
    supported = native.supported()
    assert ("avx2" in supported) == ({"avx2", "fma", "f16c"} <= set(flags))
    assert ("avx512" in supported) == ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags))
    assert "portable" in supported


@pytest.mark.parametrize("name", ["libmambakit_native.so", "libmambakit_native.dylib", "libmambakit_native.dll"])
def test_the_library_of_every_platform_is_looked_for_beside_the_package(name, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._path() == tmp_path / name
