"""Runs plans of whole layers (`mambakit.ops.fused_mixer.plan`) on CPU tensors.

The CUDA C++ kernels are compiled by g++, the Triton kernels run in Triton's interpreter, and each is given addresses
alone, as on a GPU. The native library launches the list, and calls functions of this module's for the driver's and
cuBLAS's: they find the kernel by its number and the parameters where the driver would read them.
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
from mambakit.ops._backends import launch_list, native, nvrtc, prepared_triton
from mambakit.ops._backends.launch_list import KernelItem, Place
from mambakit.ops.causal_conv1d import prepared as conv
from mambakit.ops.fused_mixer import layer, padding, parameters, signature
from mambakit.ops.linear import prepared as packed
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
        self.count = sum(isinstance(v, (torch.dtype, prepared_triton.Unaligned)) for v in arguments.values())
        self.function = Driver.number(self._launched)

    def _launched(self, parameters: Any) -> None:
        self(0, *(ctypes.c_uint64.from_address(parameters[i]).value for i in range(self.count)))

    def item(self, *places: Place) -> KernelItem:
        assert len(places) == self.count
        words = list(range(self.count))
        return KernelItem(self, (self.function, 1, 1, 1, 32, 0), words, [0] * self.count, list(enumerate(places)))

    def __call__(self, stream: int, *addresses: int) -> None:
        left = list(addresses)
        values = [_memory(left, v) for v in self.arguments.values()]
        assert not left
        self.kernel[self.grid](*values, **self.options)


class Driver:
    """cuLaunchKernel, cuMemsetD8Async, cublasGemmEx and cublasSetMathMode over memory of the CPU.

    Attributes:
        made: the names of the calls so far.
        failures: codes that the next launches and products answer; they then do no work.
    """

    kernels: dict[int, Any] = {}
    made: list[str] = []
    failures: list[int] = []
    errors: list[BaseException] = []  # of the work itself: a callback's exception would only be printed

    @classmethod
    def number(cls, kernel: Any) -> int:
        """A number for a function of the driver's array of addresses of parameters."""
        cls.kernels[len(cls.kernels) + 1] = kernel
        return len(cls.kernels)

    @classmethod
    def launch(cls, function, x, y, z, threads, one, also_one, shared, stream, parameters, extra):
        cls.made.append("launch")
        if cls.failures:
            return cls.failures.pop(0)
        assert (one, also_one, stream, extra) == (1, 1, STREAM, None)
        kernel = cls.kernels[function]
        if isinstance(kernel, PlacedKernel):
            assert shared == kernel.shared_bytes
            kernel.run(x, threads, parameters[0])
        else:
            kernel(parameters)
        return 0

    @classmethod
    def zeros(cls, at, value, count, stream):
        cls.made.append("zeros")
        assert stream == STREAM
        ctypes.memset(at, value, count)
        return 0

    @classmethod
    def product(
        cls, handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, compute, how
    ):
        """By columns, as cuBLAS counts."""
        cls.made.append("product")
        if cls.failures:
            return cls.failures.pop(0)
        assert (handle, compute) == (HANDLE, 68)
        assert how == (-1 if type_a == 0 else 99)

        def columns(at, kind, rows, count, leading):
            dtype = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}[kind]
            assert leading >= rows
            size = ((count - 1) * leading + rows) * dtype.itemsize
            memory = torch.frombuffer((ctypes.c_byte * size).from_address(at), dtype=dtype)
            return memory.as_strided((rows, count), (1, leading))

        left = columns(a, type_a, k, m, lda).T if op_a else columns(a, type_a, m, k, lda)
        right = columns(b, type_b, n, k, ldb).T if op_b else columns(b, type_b, k, n, ldb)
        into = columns(c, type_c, m, n, ldc)
        result = alpha[0] * left.float() @ right.float()
        into.copy_(result + beta[0] * into.float() if beta[0] else result)
        return 0

    @classmethod
    def math_mode(cls, handle, mode):
        cls.made.append(f"math mode {mode}")
        return 0


STREAM, HANDLE = 0x5700, 0xB1A5
_int, _pointer, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
_pointers, _floats = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_float)
_KINDS = {
    "launch": [_pointer, *[ctypes.c_uint] * 7, _pointer, _pointers, _pointer],
    "zeros": [ctypes.c_uint64, ctypes.c_ubyte, _size, _pointer],
    "product": [
        _pointer, *[_int] * 5, _floats, _pointer, _int, _int, _pointer, _int, _int, _floats, _pointer, *[_int] * 4,
    ],
    "math_mode": [_pointer, _int],
}  # fmt: skip


def _failing_loudly(function: Any) -> Any:
    def call(*arguments):
        try:
            return function(*arguments)
        except BaseException as error:
            Driver.errors.append(error)
            return 999

    return call


_FUNCTIONS = [ctypes.CFUNCTYPE(_int, *kinds)(_failing_loudly(getattr(Driver, name))) for name, kinds in _KINDS.items()]


class PlacedKernel:
    """An `nvrtc.Kernel` of a module for the CPU."""

    def __init__(self, launch: Any, shared_bytes: int = 0):
        self._launch, self.shared_bytes = launch, shared_bytes
        self.function = Driver.number(self)

    def __call__(self, grid: int, threads: int, stream: int, parameters: ctypes.Structure, grid_y: int = 1) -> None:
        assert grid_y == 1
        self.run(grid, threads, ctypes.addressof(parameters))

    def run(self, grid: int, threads: int, parameters: int) -> None:
        # A launcher reads what is at the address of the structure that it is given.
        self._launch(grid, threads, 0, ctypes.c_char.from_address(parameters))


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


# By source: its structures, and which of them each kernel takes.
_SOURCES = {
    "parameters.cu": {"mixer_parameters": "Params", "mixer_bias": "BiasParams"},
    "padding.cu": {"mixer_window": "PaddingParams", "mixer_steps": "PaddingParams"},
}


class MixerModule:
    """`parameters.cu` or `padding.cu`, compiled by g++."""

    def __init__(self, folder: Path, source: str, macros: dict[str, int]):
        text = (Path(parameters.__file__).parent / source).read_text()
        for assembly, plain in _REPLACEMENTS.items():
            text = text.replace(assembly, plain)
        assert "asm(" not in text
        self._names = list(_SOURCES[source])
        cases = "".join(
            f"if (which == {i}) {{ auto p = *(const {kind}*)f;"
            f" run_grid(blocks, 1, threads, 0, [=]() {{ {name}(p); }}, false); }}\n"
            for i, (name, kind) in enumerate(_SOURCES[source].items())
        )
        signature = "int which, unsigned blocks, unsigned threads, const void* f"
        text = f'#include "cuda_on_cpu.h"\n{text}extern "C" void run({signature}) {{\n{cases}}}\n'
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        path = folder / f"mixer{hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            command = [cuda_on_cpu.COMPILER, "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            command += [f"-I{Path(cuda_on_cpu.__file__).parents[1]}", *flags, "-x", "c++", "-", "-o", str(path)]
            subprocess.run(command, input=text, text=True, check=True)
        self.run = ctypes.CDLL(str(path)).run
        self.run.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]

    def kernel(self, name: str) -> PlacedKernel:
        which = self._names.index(name)

        def launch(grid: int, threads: int, stream: int, fields: Any) -> None:
            self.run(which, grid, threads, ctypes.addressof(fields))

        return PlacedKernel(launch)


class ScanModule(cuda_on_cpu.Module):
    """The scan's, with kernels that a list can launch."""

    def kernel(self, name: str, shared_bytes: int = 0) -> Any:
        return PlacedKernel(super().kernel(name, shared_bytes), shared_bytes)


def install(monkeypatch, folder: Path, listed: bool = True) -> None:
    """Until the test ends, whole layers run as plans on CPU tensors, launched as one list or item by item."""
    cuda_on_cpu.install(monkeypatch, folder)
    cuda_on_cpu.forget()
    parameters._module.cache_clear()
    padding._module.cache_clear()
    Driver.made.clear()
    Driver.failures.clear()
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in _FUNCTIONS]
    functions = (ctypes.c_void_p * 4)(*addresses) if listed and native.is_available() else None
    monkeypatch.setattr(launch_list, "_functions", lambda: functions)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentBlasHandle", lambda: HANDLE, raising=False)

    def module(where, source, macros, device):
        return MixerModule(folder, source, macros) if source in _SOURCES else ScanModule(folder, macros)

    monkeypatch.setattr(nvrtc, "Module", module)
    for user in (conv, norm, selection_norm, token, packed):
        monkeypatch.setattr(user, "PreparedTriton", InterpretedTriton)
    monkeypatch.setattr(signature, "unavailable", lambda: None)
    monkeypatch.setattr(layer, "_plans", {})
    for user in (layer, fused_layer, inner, block):
        monkeypatch.setattr(user, "on_gpu", lambda x: x.device.type == "cpu")


def forget() -> None:
    """Drop what was compiled for the CPU."""
    cuda_on_cpu.forget()
    parameters._module.cache_clear()
    padding._module.cache_clear()
