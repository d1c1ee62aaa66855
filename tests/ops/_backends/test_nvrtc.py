"""Launching through the driver, with a driver that is not there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from mambakit.ops._backends import nvrtc


def kernel_with(monkeypatch, codes: list[int]) -> tuple[nvrtc.Kernel, list[tuple], list[int]]:
    calls: list[tuple] = []
    contexts: list[int] = []

    def launch(*arguments):
        calls.append(arguments)
        return codes.pop(0)

    monkeypatch.setattr(nvrtc, "_launcher", lambda cooperative: launch)
    monkeypatch.setattr(nvrtc, "use_context", contexts.append)
    monkeypatch.setattr(nvrtc.torch.cuda, "current_device", lambda: 3)
    return nvrtc.Kernel(1234, 64), calls, contexts


class Parameters(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), ("n", ctypes.c_int64), ("m", ctypes.c_int64)]


def test_parameters_reach_the_driver(monkeypatch):
    kernel, calls, contexts = kernel_with(monkeypatch, [0])
    parameters = Parameters(p=1, n=-2, m=2**40)
    kernel(5, 128, 77, parameters, grid_y=6)
    assert calls[0][:9] == (1234, 5, 6, 1, 128, 1, 1, 64, 77)
    # An array of pointers, of which there is one: to the structure.
    seen = Parameters.from_address(ctypes.c_void_p.from_address(calls[0][9]).value)
    assert (seen.p, seen.n, seen.m) == (1, -2, 2**40)
    assert contexts == []


def test_a_thread_without_a_context_gets_one(monkeypatch):
    kernel, calls, contexts = kernel_with(monkeypatch, [nvrtc.INVALID_CONTEXT, 0])
    kernel(1, 32, 0, Parameters())
    assert contexts == [3]
    assert calls[0] == calls[1]


def test_a_launch_that_fails_says_so(monkeypatch):
    driver = SimpleNamespace(CUresult=lambda code: SimpleNamespace(name=f"CUDA_ERROR_{code}"))
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (driver, None))
    kernel, _, _ = kernel_with(monkeypatch, [719])
    with pytest.raises(RuntimeError, match="kernel launch failed: CUDA_ERROR_719"):
        kernel(1, 32, 0, Parameters())
