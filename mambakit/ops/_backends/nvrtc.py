"""CUDA C++ compiled at run time (NVRTC, which torch's CUDA wheels bring) and launched on torch's current stream.

`Module` compiles a source once per device and set of macros and keeps the machine code in the user's cache folder:
``$MAMBAKIT_CACHE``, else ``$XDG_CACHE_HOME/mambakit``, else ``~/.cache/mambakit``. The file's name is a hash of
everything that went into it, so an old file is never wrong, only unused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from pathlib import Path

import torch

from mambakit.ops._backends import memory


@functools.cache
def _bindings():
    """cuda-bindings' driver and nvrtc, with the library behind nvrtc loaded; ImportError or RuntimeError without."""
    from cuda.bindings import driver, nvrtc

    _check(nvrtc.nvrtcVersion())
    return driver, nvrtc


@functools.cache
def available() -> str | None:
    """Why kernels cannot be compiled here, or None when they can."""
    if torch.version.hip is not None:
        return "the device is an AMD GPU"
    try:
        _bindings()
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}; pip install 'mambakit[gpu]')"
    except RuntimeError as error:
        return f"NVRTC cannot be loaded ({error})"
    return None


def _check(result):
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return values[0] if len(values) == 1 else values


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a CTA may have: 227 KB on Hopper and B200, 163 on A100, 99 on Ada."""
    driver, _ = _bindings()
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_check(driver.cuDeviceGetAttribute(attribute, _check(driver.cuDeviceGet(device)))))


def _cache_folder() -> Path:
    if "MAMBAKIT_CACHE" in os.environ:
        return Path(os.environ["MAMBAKIT_CACHE"]) / "kernels"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mambakit" / "kernels"


def compile_cubin(source: str, name: str, headers: dict[str, str], arch: str, options: tuple[str, ...]) -> bytes:
    """The machine code of ``source`` for ``arch`` ("sm_90"), from the cache or compiled into it."""
    _, nvrtc = _bindings()
    version = _check(nvrtc.nvrtcVersion())
    everything = repr((source, sorted(headers.items()), arch, options, tuple(version)))
    digest = hashlib.sha256(everything.encode()).hexdigest()
    path = _cache_folder() / f"{Path(name).stem}-{arch}-{digest[:24]}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = _compile(nvrtc, source, name, headers, (f"--gpu-architecture={arch}", *options))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # whole or not at all, also when several processes compile the same kernel
    except OSError:
        pass  # a read-only home costs a compilation per process, nothing else
    return cubin


def machine_code(folder: Path, source: str, macros: dict[str, int], arch: str) -> bytes:
    """`compile_cubin` of a file beside its headers, with its macros. Needs no GPU."""
    files = {path.name: path.read_text() for path in sorted(folder.glob("*.cuh"))}
    options = (
        "--std=c++17",
        "--device-as-default-execution-space",
        *(f"-D{name}={value}" for name, value in macros.items()),
    )
    return compile_cubin((folder / source).read_text(), source, files, arch, options)


def _compile(nvrtc, source, name, headers, options) -> bytes:
    texts, names = [h.encode() for h in headers.values()], [h.encode() for h in headers]
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(headers), texts, names))
    try:
        flags = [option.encode() for option in options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if int(error) != 0:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{log.decode(errors='replace')}")
        cubin = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def address(tensor: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], device: int) -> int:
    """`memory.address` of a whole contiguous tensor on GPU ``device``; 0 where there is none."""
    return 0 if tensor is None else memory.address(tensor, dtypes, tensor.numel(), device)


class _Arguments(threading.local):
    """The driver's array of pointers to a kernel's parameters, of which there is one; an array per thread."""

    def __init__(self):
        self.pointer = ctypes.c_void_p()
        self.address = ctypes.addressof(self.pointer)


_arguments = _Arguments()


@functools.cache
def _launcher(cooperative: bool):
    """cuLaunchKernel as a plain C call: a few microseconds less per launch than through cuda-bindings' objects."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    launch = library.cuLaunchCooperativeKernel if cooperative else library.cuLaunchKernel
    pointers = 2 if cooperative else 3  # stream, parameters; extra
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * pointers]
    launch.restype = ctypes.c_int
    return launch


@functools.cache
def functions() -> tuple[int, int]:
    """Addresses of cuLaunchKernel and cuMemsetD8Async."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    found = library.cuLaunchKernel, library.cuMemsetD8Async
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in found)  # type: ignore[return-value]


INVALID_CONTEXT = 201


def error_name(code: int) -> str:
    """The driver's name of an error."""
    return _bindings()[0].CUresult(code).name


def use_context(device: int) -> None:
    """Make the device's context this thread's, as CUDA's run time does at a thread's first call.

    A thread of autograd's may launch or load before it has made any.
    """
    driver, _ = _bindings()
    handle = _check(driver.cuDeviceGet(device))
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(handle))))


def parameter_sizes(function: int) -> list[int]:
    """Bytes of each parameter of a kernel, as its machine code has them.

    Raises:
        RuntimeError: a driver before CUDA 12.4, which does not tell.
    """
    driver, _ = _bindings()
    sizes: list[int] = []
    while True:
        error, *found = driver.cuFuncGetParamInfo(driver.CUfunction(int(function)), len(sizes))
        if int(error) == 1:  # CUDA_ERROR_INVALID_VALUE: there is no parameter of this number
            return sizes
        _check((error, *found))
        sizes.append(int(found[1]))


class Launch:
    """A launch of which only what is at its parameters' addresses changes.

    Attributes:
        call: function, grid, threads, bytes of shared memory.
    """

    def __init__(self, function: int, grid: tuple[int, int, int], threads: int, shared_bytes: int):
        self.call = function, *grid, threads, shared_bytes
        self._launch = functools.partial(_launcher(False), function, *grid, threads, 1, 1, shared_bytes)

    def __call__(self, stream: int, parameters: int) -> None:
        """``parameters``: where the addresses of the kernel's parameters are."""
        error = self._launch(stream, parameters, None)
        if error == 0:
            return
        if error == INVALID_CONTEXT:
            use_context(torch.cuda.current_device())
            error = self._launch(stream, parameters, None)
        if error != 0:
            raise RuntimeError(f"kernel launch failed: {error_name(error)}")


class Kernel:
    """One kernel whose only parameter is a struct, which ``parameters`` mirrors; the driver copies it at the launch.

    ``cooperative``: all CTAs are resident at once, or the launch fails: they may wait for each other.
    """

    def __init__(self, function, shared_bytes: int, cooperative: bool = False):
        self.function, self.shared_bytes = int(function), shared_bytes
        self._launch = _launcher(cooperative)
        self._extra = () if cooperative else (None,)

    def __call__(
        self, grid: int, threads: int, stream: int, parameters: ctypes.Structure, grid_y: int = 1
    ) -> None:  # fmt: skip
        arguments = _arguments
        arguments.pointer.value = ctypes.addressof(parameters)
        call = (
            self.function,
            grid,
            grid_y,
            1,
            threads,
            1,
            1,
            self.shared_bytes,
            stream,
            arguments.address,
            *self._extra,
        )
        error = self._launch(*call)
        if error == INVALID_CONTEXT:
            use_context(torch.cuda.current_device())
            error = self._launch(*call)
        if error != 0:
            raise RuntimeError(f"kernel launch failed: {error_name(error)}")


class Module:
    """The kernels of one source with one set of macros on one device, by name."""

    def __init__(self, folder: Path, source: str, macros: dict[str, int], device: int):
        driver, _ = _bindings()
        major, minor = torch.cuda.get_device_capability(device)
        cubin = machine_code(folder, source, macros, f"sm_{major}{minor}")
        with torch.cuda.device(device):
            use_context(device)
            self._module = _check(driver.cuModuleLoadData(cubin))

    def kernel(self, name: str, shared_bytes: int = 0, cooperative: bool = False) -> Kernel:
        """``shared_bytes`` of dynamic shared memory; ``cooperative`` as `Kernel` says."""
        driver, _ = _bindings()
        function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes > 0:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        return Kernel(function, shared_bytes, cooperative)
