"""Runs the persistent step on CPU tensors: g++ compiles persistent.cu with this folder's `primitives.cuh`.

It covers the kernel's logic (weight tiles, the ring, the grid exchange, the sums) and all of `cuda_persistent.py` but
the launch; not the compiler's code, the order of memory accesses, or anything about speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch

from mambakit.ops.decode import cuda_persistent as persistent

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


def install(monkeypatch, folder: Path, blocks: int, shared: int = 232448) -> None:
    """Until the test ends, `PersistentStep` runs on CPU tensors, planned for a card of so many multiprocessors."""
    source = Path(persistent.__file__).with_name("persistent.cu").read_text()
    source = source.replace("extern __shared__ __align__(128) char memory[];", "char* memory = shared_memory;")
    source += (
        'extern "C" void allow(const char* begin, size_t bytes) { given.push_back({begin, begin + bytes}); }\n'
        'extern "C" void run(unsigned blocks, unsigned threads, const void* fields) {\n'
        "auto p = *(const Params*)fields;\n"
        "run_grid(blocks, 1, threads, SHARED, [=]() { decode_step(p); }, true);\ngiven.clear();\n}\n"
    )

    def kernel(macros: tuple[tuple[str, int], ...], device: int):
        flags = [f"-D{name}={value}" for name, value in macros]
        path = folder / f"{hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            assert COMPILER is not None
            # No optimisation: quick to compile, and locals survive longjmp. The cases are small.
            command = [COMPILER, "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            command += [f"-I{HERE}", f"-I{HERE.parent}", *flags, "-x", "c++", "-", "-o", str(path)]
            subprocess.run(command, input=source, text=True, check=True)
        library = ctypes.CDLL(str(path))
        library.run.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]
        library.allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

        def launch(grid: int, threads: int, stream: int, parameters: ctypes.Structure) -> None:
            for tensor in launch.kept:
                library.allow(tensor.data_ptr(), tensor.nbytes)
            library.run(grid, threads, ctypes.addressof(parameters))

        return launch

    made = persistent.PersistentStep.__init__

    def make(self, *arguments, **options) -> None:
        made(self, *arguments, **options)
        self._kernel.kept = [tensor for tensor in self._kept if tensor is not None]

    monkeypatch.setattr(persistent.PersistentStep, "__init__", make)
    monkeypatch.setattr(persistent, "_kernel", kernel)
    monkeypatch.setattr(persistent, "_limits", lambda device: (blocks, shared))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
