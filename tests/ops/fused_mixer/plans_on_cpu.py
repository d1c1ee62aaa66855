"""Runs plans of whole layers (`mambakit.ops.fused_mixer.plan`) on CPU tensors.

The CUDA C++ kernels are compiled by g++, the Triton kernels run in Triton's interpreter, and each is given addresses
alone, as on a GPU.

What it covers is all but the launches themselves.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import torch

from mambakit.compat import block, inner
from mambakit.modules.mixers import fused_layer
from mambakit.ops._backends import nvrtc, prepared_triton
from mambakit.ops.causal_conv1d import prepared as conv
from mambakit.ops.fused_mixer import layer, parameters, signature
from mambakit.ops.rms_norm import prepared as norm
from mambakit.ops.selection_norm import prepared as selection_norm
from mambakit.ops.selective_scan import prepared_token as token
from tests.ops.selective_scan import cuda_on_cpu

_REPLACEMENTS = {
    'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));': (
        "w = to_bfloat16(low) | to_bfloat16(high) << 16;"
    ),
    'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));': (
        "_Float16 pair[2] = {(_Float16)low, (_Float16)high}; memcpy(&w, pair, 4);"
    ),
}


class InterpretedTriton:
    """`PreparedTriton` in Triton's interpreter."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]):
        self.kernel, self.grid, self.arguments, self.options = kernel, grid, arguments, options

    def __call__(self, stream: int, *addresses: int) -> None:
        left = list(addresses)
        values = [_memory(left, v) for v in self.arguments.values()]
        assert not left
        self.kernel[self.grid](*values, **self.options)


def _memory(addresses: list[int], value: Any) -> Any:
    """An argument: memory from the next address on where it stands for one."""
    aligned = isinstance(value, torch.dtype)
    if not aligned and not isinstance(value, prepared_triton.Unaligned):
        return value
    address, dtype = addresses.pop(0), value if aligned else value.dtype
    assert not (aligned and address % 16)
    if address == 0:
        return torch.empty(0, dtype=dtype)
    # The interpreter reads and writes by address, whatever the tensor's size.
    return torch.frombuffer((ctypes.c_byte * 16).from_address(address), dtype=dtype)


class ParametersModule:
    """`parameters.cu` compiled by g++."""

    def __init__(self, folder: Path, macros: dict[str, int]):
        text = (Path(parameters.__file__).parent / "parameters.cu").read_text()
        for assembly, plain in _REPLACEMENTS.items():
            text = text.replace(assembly, plain)
        assert "asm(" not in text
        text = (
            f'#include "cuda_on_cpu.h"\n{text}extern "C" void run(unsigned blocks, unsigned threads, const void* f) {{'
            " auto p = *(const Params*)f; run_grid(blocks, 1, threads, 0, [=]() { mixer_parameters(p); }, false); }\n"
        )
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        path = folder / f"parameters{hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            command = [cuda_on_cpu.COMPILER, "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            command += [f"-I{Path(cuda_on_cpu.__file__).parents[1]}", *flags, "-x", "c++", "-", "-o", str(path)]
            subprocess.run(command, input=text, text=True, check=True)
        self.run = ctypes.CDLL(str(path)).run
        self.run.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]

    def kernel(self, name: str):
        def launch(grid: int, threads: int, stream: int, fields: ctypes.Structure) -> None:
            self.run(grid, threads, ctypes.addressof(fields))

        return launch


def install(monkeypatch, folder: Path) -> None:
    """Until the test ends, whole layers run as plans on CPU tensors."""
    cuda_on_cpu.install(monkeypatch, folder)
    cuda_on_cpu.forget()
    parameters._module.cache_clear()
    scan_module = nvrtc.Module

    def module(where, source, macros, device):
        own = source == "parameters.cu"
        return ParametersModule(folder, macros) if own else scan_module(where, source, macros, device)

    monkeypatch.setattr(nvrtc, "Module", module)
    for user in (conv, norm, selection_norm, token):
        monkeypatch.setattr(user, "PreparedTriton", InterpretedTriton)
    monkeypatch.setattr(signature, "unavailable", lambda: None)
    monkeypatch.setattr(layer, "_plans", {})
    for user in (layer, fused_layer, inner, block):
        monkeypatch.setattr(user, "on_gpu", lambda x: x.device.type == "cpu")


def forget() -> None:
    """Drop what was compiled for the CPU."""
    cuda_on_cpu.forget()
    parameters._module.cache_clear()
