"""Triton kernels that are launched with addresses alone: the rest of a launch is put together once.

Triton looks at the type and the alignment of every argument of every launch. Here that happens when a `PreparedTriton`
is made; a launch then stores a few addresses and makes one call of the driver's.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.launch_list import KernelItem, Place

_SCRATCH = 2  # pointers that Triton appends to a kernel's parameters for scratch memory, where it does


class NotPreparedError(RuntimeError):
    """A kernel that this release of Triton, or this driver, does not let one launch by addresses."""


class Unaligned:
    """Stands for an address of any element of ``dtype``, as a dtype stands for one where 16 bytes can be read."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.dtype.itemsize


class PreparedTriton:
    """One kernel for one set of sizes on the current GPU.

    Args:
        kernel: the `triton.jit` function.
        grid: programs, one to three numbers.
        arguments: the kernel's own, by name and in its order. A dtype stands for an address, which a launch gives, at
            which 16 bytes can be read at once, `Unaligned` for any other; None for no tensor.
        options: its constants, and what Triton takes beside them (``num_warps``).

    Raises:
        NotPreparedError: this release of Triton passes parameters in a way that is not known here.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]):
        compiled = kernel.warmup(*arguments.values(), grid=grid, **options)
        compiled.run  # noqa: B018, loads the machine code
        kinds = dict(compiled.src.signature)
        passed = [name for name in arguments if kinds[name] != "constexpr" and not _is_constant(compiled, name)]
        places = [name for name in arguments if isinstance(arguments[name], (torch.dtype, Unaligned))]
        if any(name not in passed for name in places):
            raise NotPreparedError(f"Triton's {kernel.__name__} does not take the addresses {places} as parameters")
        order = [*places, *(name for name in passed if name not in places)]
        self._count, self._addresses = len(places), (ctypes.c_uint64 * (len(order) + _SCRATCH))()
        for i, name in enumerate(order[self._count :], self._count):
            self._addresses[i] = _bits(kinds[name], arguments[name])
        start = ctypes.addressof(self._addresses)
        slots = [*map(order.index, passed), *range(len(order), len(order) + _SCRATCH)]
        self._slots = slots
        self._parameters = (ctypes.c_void_p * len(slots))(*(start + 8 * slot for slot in slots))
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or getattr(metadata, "global_scratch_size", 0):
            raise NotPreparedError(f"Triton's {kernel.__name__} asks for clusters or scratch memory")
        _check_parameters(compiled.function, [8 if kinds[name].startswith("*") else _SIZES[kinds[name]][0]
                                              for name in passed])  # fmt: skip
        threads = 32 * metadata.num_warps
        x, y, z = (*grid, 1, 1)[:3]
        self._launch = nvrtc.Launch(compiled.function, (x, y, z), threads, metadata.shared)
        self._lock = threading.Lock()
        self._at = ctypes.addressof(self._parameters)
        self._kept = compiled  # its machine code stays loaded

    def item(self, *places: Place) -> KernelItem:
        """The launch in a list, with the addresses' places in the order of the arguments that stand for some."""
        block = list(self._addresses)
        for i in range(self._count):
            block[i] = 0
        # As signed numbers, which is what a list's words are.
        block = [word - 2**64 if word >= 2**63 else word for word in block]
        return KernelItem(self, self._launch.call, self._slots, block, list(enumerate(places)))

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launch with ``addresses`` in the order of the arguments that stand for some."""
        with self._lock:
            self._addresses[: self._count] = list(addresses)
            self._launch(stream, self._at)


def _is_constant(compiled: Any, name: str) -> bool:
    """Whether Triton compiled an argument in; its releases name constants by name, or by position."""
    index = compiled.src.fn.arg_names.index(name)
    constants = getattr(compiled.src, "constants", {})
    return any(key in constants for key in (name, index, (index,)))


# Bytes of a parameter, and how its value is written.
_SIZES = {"i32": (4, "<i"), "i64": (8, "<q"), "fp32": (4, "<f")}


def _bits(kind: str, value: Any) -> int:
    if kind not in _SIZES:
        raise NotPreparedError(f"a parameter of Triton's type {kind!r} is not known")
    return int.from_bytes(struct.pack(_SIZES[kind][1], value), "little")


def _check_parameters(function: int, sizes: list[int]) -> None:
    """Whether the machine code takes parameters of these sizes, then at most pointers to scratch memory."""
    try:
        found = nvrtc.parameter_sizes(function)
    except RuntimeError as error:
        raise NotPreparedError(f"the driver does not tell a kernel's parameters ({error}); update it to 550") from error
    extra = found[len(sizes) :]
    if found[: len(sizes)] != sizes or len(extra) > _SCRATCH or any(size != 8 for size in extra):
        raise NotPreparedError(f"the kernel's parameters have {found} bytes, expected {sizes}")
