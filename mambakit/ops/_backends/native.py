"""Find and load the native library; the kernel of a name for the instruction set in use."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

# Best first. A kernel's symbol is its name and the instruction set: selective_scan_avx512.
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2vnni", "avx2", "i8mm", "dotprod", "neon", "portable")
# Sets that add instructions for products: their other kernels are those of the set that they extend.
EXTENDS = {"avx512vnni": "avx512", "avx2vnni": "avx2", "i8mm": "neon", "dotprod": "neon"}
# Of Linux, macOS and Windows: with the MinGW toolchain's prefix, and without.
_NAMES = ("libmambakit_native.so", "libmambakit_native.dylib", "libmambakit_native.dll", "mambakit_native.dll")
_REMEDY = (
    "mambakit's native CPU kernels are not installed, so plain PyTorch serves the ops; it is slower. "
    "Install a C++ compiler (GCC or Clang), then mambakit again from its sources: in a clone of the repository "
    "`pip install --force-reinstall --no-deps .`"
)


class _State:
    isa: str | None = None
    forked = False  # an OpenMP team does not survive fork(): a forked child runs its kernels on one thread


def _path() -> Path | None:
    """Beside this file in a wheel; an editable install keeps compiled files in site-packages."""
    here = Path(__file__).parent
    for name in _NAMES:
        if (here / name).is_file():
            return here / name
    try:
        files = importlib.metadata.files("mambakit") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name in _NAMES), None)


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = _path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.mambakit_supports.argtypes = [ctypes.c_char_p]
    library.mambakit_use_team.argtypes = [ctypes.c_void_p]
    team = _torch_team()
    if team is not None:
        library.mambakit_use_team(team)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
    return library


def _torch_team() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch runs on.

    With it the kernels run on torch's own threads. A second pool would compete with them for the same cores: an idle
    OpenMP thread spins for milliseconds.
    """
    for name in (None, *map(str, _runtimes(Path(torch.__file__).parent))):
        team = _team_of(name)
        if team is not None:
            return team
    return None


def _runtimes(package: Path) -> list[Path]:
    """The OpenMP runtimes of a wheel of torch: in its own ``lib``, or beside it in ``torch.libs`` (aarch64)."""
    folders = (package / "lib", package.with_name(f"{package.name}.libs"))
    patterns = ("libgomp*", "libomp*", "libiomp*")
    return [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]


def _team_of(runtime: str | None) -> ctypes.c_void_p | None:
    """GOMP_parallel in one shared library, or (None) in what the process has loaded for all to see."""
    try:
        return ctypes.cast(ctypes.CDLL(runtime).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _after_fork() -> None:
    _State.forked = True


def supported() -> list[str]:
    """Instruction sets that the library was built for and this processor runs, best first."""
    library = _library()
    if library is None:
        return []
    return [i for i in INSTRUCTION_SETS if _symbol("linear", i) and library.mambakit_supports(i.encode())]


def _symbol(name: str, isa: str) -> Callable | None:
    return getattr(_library(), f"{name}_{isa}", None)


def use_isa(isa: str | None = None) -> None:
    """Run the kernels compiled for ``isa``; None for the best that this processor supports.

    Raises:
        ValueError: the library has no such kernels, or the processor does not run them.
    """
    choices = supported()
    if isa is not None and isa not in choices:
        raise ValueError(f"instruction set {isa!r} is not available here; choose one of {choices}")
    _State.isa = isa
    kernel.cache_clear()


def current_isa() -> str | None:
    choices = supported()
    return _State.isa or (choices[0] if choices else None)


@functools.cache
def kernel(name: str) -> Callable:
    """The C function ``name`` for the instruction set in use. It takes pointers to structures and int64, returns 0."""
    isa = current_isa()
    assert isa is not None, "kernels are asked for only where the library is"
    function = _symbol(name, isa) or _symbol(name, EXTENDS[isa])
    assert function is not None, f"{name} was not built for {isa}"
    function.restype = ctypes.c_int  # type: ignore[attr-defined]
    return function


def kernel_address(name: str) -> int:
    address = ctypes.cast(kernel(name), ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def runner() -> Callable:
    """The C function that runs an array of kernel calls."""
    library = _library()
    assert library is not None, "programs are made only where the library is"
    return library.mambakit_run


@functools.cache
def launcher() -> Callable:
    """The C function that enqueues a list of GPU work (`launch_list.cpp`)."""
    library = _library()
    assert library is not None, "lists are launched by it only where the library is"
    function = library.mambakit_launch_list
    word, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [address, address, word, word, address, address, address, word]
    function.restype = word
    return function


@functools.cache
def lacks_bfloat16_products() -> bool:
    """Whether the processor is known to have no instructions for products of bfloat16, which torch then emulates."""
    library = _library()
    return library is not None and not library.mambakit_supports(b"bfloat16")


def is_available() -> bool:
    return _library() is not None


@functools.cache
def warn_missing() -> None:
    """Say once that plain PyTorch serves."""
    warnings.warn(_REMEDY, RuntimeWarning, stacklevel=4)


def threads() -> int:
    return 1 if _State.forked else torch.get_num_threads()


def describe() -> dict[str, object]:
    """What serves the ops on a CPU: ``isa``, ``path``, ``threads``, ``team`` ("torch's OpenMP" or "own threads")."""
    if not is_available():
        return {"isa": None, "path": None, "threads": torch.get_num_threads(), "team": None, "remedy": _REMEDY}
    return {
        "isa": current_isa(),
        "supported": supported(),
        "path": str(_path()),
        "threads": threads(),
        "team": "own threads" if _torch_team() is None else "torch's OpenMP",
    }
