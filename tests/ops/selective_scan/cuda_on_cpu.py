"""Runs the CUDA C++ scan on CPU tensors: g++ compiles the kernels against `cuda_on_cpu.h` instead of NVRTC for a GPU.

What this covers is the kernels' logic (indices, barriers, chunks, tails) and all of `cuda.py` but the launch itself;
not the compiler's code, the approximate instructions, or anything about speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import re
import shutil
import subprocess
from pathlib import Path

import torch

from mambakit.ops.selective_scan import cuda, cuda_backward, cuda_forward, cuda_launch

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")

# The inline assembly of common.cuh, and what it computes.
REPLACEMENTS = {
    'float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;': (
        "float y = exp2f(x); return y < 1.17549435e-38f ? 0.f : y;"
    ),
    'float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;': "return 1.f / x;",
    'asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));': "_Float16 half; memcpy(&half, &bits, 2); y = half;",
    'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));': (
        "w = to_bfloat16(low) | to_bfloat16(high) << 16;"
    ),
    'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));': (
        "_Float16 pair[2] = {(_Float16)low, (_Float16)high}; memcpy(&w, pair, 4);"
    ),
    'asm("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), '
    '"=r"(x.w) : "l"(p));': "x = *p;",
    'asm("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));': "x = *p;",
    'asm volatile("cp.async.commit_group;" ::: "memory");': "async_commit();",
    'asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");': "async_wait(LATER);",
    "extern __shared__ __align__(16) char memory[];": "char* memory = shared_memory;",
}
COPY = re.compile(
    r"u32 to = \(u32\)__cvta_generic_to_shared\(shared\);\s*asm volatile\((?:COPY_PIECE |\"cp\.async).*?\);\n",
    re.DOTALL,
)

PARAMETERS = {
    "forward": "ForwardParams",
    "backward": "BackwardParams",
    "backward_carries": "BackwardParams",
    "reduce": "ReduceParams",
    "sequences": "SequencesParams",
}


def _source(name: str) -> str:
    text = (cuda_launch._FOLDER / name).read_text()
    for assembly, plain in REPLACEMENTS.items():
        text = text.replace(assembly, plain)
    text = COPY.sub("async_copy(shared, p, count > 0 ? BYTES : 0, BYTES);\n", text)
    assert "asm" not in re.sub("//.*", "", text), f"{name} has inline assembly that cuda_on_cpu.py does not know"
    return text


class Module:
    """`nvrtc.Module` on the CPU; ``folder`` keeps the compiled libraries."""

    def __init__(self, folder: Path, macros: dict[str, int]):
        kind, kernels = (
            ("forward", ["forward", "sequences"])
            if "FORWARD" in macros
            else ("backward", ["backward", "backward_carries", "reduce", "sequences"])
        )
        self.kernels = kernels
        entries = "".join(
            f"if (which == {i}) {{ auto p = *(const {PARAMETERS[name]}*)fields;"
            f" run_grid(blocks, blocks_y, threads, shared, [=]() {{ selective_scan_{name}(p); }}, together); }}\n"
            for i, name in enumerate(kernels)
        )
        text = (
            f'#include "cuda_on_cpu.h"\n{_source("common.cuh")}{_source(f"{kind}.cuh")}'
            'extern "C" void run(int which, unsigned blocks, unsigned blocks_y, unsigned threads, size_t shared,'
            f" const void* fields, bool together) {{\n{entries}}}\n"
            f'extern "C" size_t shared_bytes() {{ return sizeof({kind.title()}Shared); }}\n'
        )
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        path = folder / f"{hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            assert COMPILER is not None
            # No optimisation: quick to compile, and locals survive longjmp. The cases are small.
            command = [
                COMPILER,
                "-std=c++17",
                "-O0",
                "-w",
                "-shared",
                "-fPIC",
                "-fno-strict-aliasing",
                f"-I{HERE.parent}",
                *flags,
            ]
            subprocess.run([*command, "-x", "c++", "-", "-o", str(path)], input=text, text=True, check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.run.argtypes = [
            ctypes.c_int,
            *[ctypes.c_uint] * 3,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_bool,
        ]
        self.chained = macros["CHAINED"]
        self.library.shared_bytes.restype = ctypes.c_size_t

    def kernel(self, name: str, shared_bytes: int = 0):
        which = self.kernels.index(name.removeprefix("selective_scan_"))
        together = which == 0 and self.chained
        if which == 0:
            needed = self.library.shared_bytes()  # a chained scan may ask for more, for fewer resident blocks
            assert shared_bytes == needed or (together and shared_bytes > needed), (
                f"plan.py counts {shared_bytes} bytes of shared memory, the kernel {needed}"
            )

        def launch(grid: int, threads: int, stream: int, parameters: ctypes.Structure, grid_y: int = 1) -> None:
            self.library.run(which, grid, grid_y, threads, shared_bytes, ctypes.addressof(parameters), together)

        return launch


def install(monkeypatch, folder: Path, multiprocessors: int = 132) -> None:
    """Until the test ends, cuda.py runs its kernels on CPU tensors, planned for so many multiprocessors."""
    monkeypatch.setattr(cuda.nvrtc, "Module", lambda _folder, _source, macros, _device: Module(folder, macros))
    monkeypatch.setattr(cuda.nvrtc, "available", lambda: None)
    monkeypatch.setattr(cuda_launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(cuda.nvrtc, "shared_memory", lambda device: 227 * 1024)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)


def guarded(t: torch.Tensor, before: bool) -> torch.Tensor:
    """A contiguous copy of ``t`` with memory that cannot be read right before it, or right after it."""
    page = mmap.PAGESIZE
    size = t.numel() * t.element_size()
    used = -(-size // page) * page
    memory = mmap.mmap(-1, used + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + (0 if before else used)), page, 0) == 0  # PROT_NONE
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=page if before else used - size)
    return copy.view(t.shape).copy_(t)


def forget() -> None:
    """Drop what cuda.py keeps between calls."""
    for kept in (cuda_launch.compiled, cuda_forward.forward_kernel, cuda_backward.backward_kernel):
        kept.cache_clear()
