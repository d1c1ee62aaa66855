"""GPU work that is put together once and enqueued by one call: kernels, matrix products, memory set to zeros.

A list's items name their memory by `Place`: an array of the call, and bytes from its beginning. Where the native
library and torch's cuBLAS are found, a call of the list is one call into C++ (`launch_list.cpp`), or one for each run
of items between those that Python alone can enqueue (`HostItem`); elsewhere the items are enqueued one by one from
Python, and products are torch's. Both read the same items.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mambakit.ops._backends import cublas, native, nvrtc
from mambakit.ops._products import product_into

_LAUNCH, _ZEROS, _PRODUCT, _HOST = range(4)


class Place(NamedTuple):
    """Memory of a call: its array of this number, from so many bytes on."""

    array: int
    offset: int = 0

    def __add__(self, more: int) -> Place:  # type: ignore[override]
        """So many bytes further."""
        return Place(self.array, self.offset + more)


class Matrix(NamedTuple):
    """A matrix in an array of the call, in elements of that array's dtype."""

    array: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    start: int = 0

    @property
    def t(self) -> Matrix:
        return Matrix(self.array, self.shape[::-1], self.strides[::-1], self.start)

    def of(self, arrays: Sequence[Any]) -> Tensor:
        base = arrays[self.array]
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.start)


class Item(Protocol):
    """A piece of a list's work."""

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        """Enqueue it from Python; ``at`` has the arrays' addresses."""

    def words(self) -> list[int] | None:
        """As `launch_list.cpp` reads it, without its header; None where it does not."""

    kind: int


class HostItem:
    """An item that Python alone can enqueue: a call of torch's."""

    kind = _HOST

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        raise NotImplementedError

    def words(self) -> list[int] | None:
        return None


class KernelItem:
    """A launch whose parameters are ``block``, 64-bit words of which some are addresses.

    Args:
        launch: ``launch(stream, *addresses)``, the same from Python.
        call: function, grid (3), threads and bytes of shared memory.
        parameters: the word at which each parameter begins.
        places: (word of the block, place) of each address, in the order in which ``launch`` takes them.
    """

    kind = _LAUNCH

    def __init__(
        self, launch: Callable[..., None], call: tuple[int, ...], parameters: list[int], block: list[int],
        places: list[tuple[int, Place]],
    ):  # fmt: skip
        self._launch, self._call, self._parameters, self._block, self._places = launch, call, parameters, block, places

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        self._launch(stream, *[at[place.array] + place.offset for _, place in self._places])

    def words(self) -> list[int]:
        sizes = len(self._parameters), len(self._block), len(self._places)
        patches = [number for word, place in self._places for number in (word, *place)]
        return [*self._call, *sizes, *self._parameters, *self._block, *patches]


def structure_item(
    kernel: Any, grid: int, threads: int, parameters: ctypes.Structure, places: dict[str, Place | None]
) -> KernelItem:
    """A launch of an `nvrtc.Kernel`; the fields of its structure that ``places`` names are addresses, where there is
    one."""
    kind = type(parameters)
    size = ctypes.sizeof(kind)
    assert size % 8 == 0
    block = list((ctypes.c_int64 * (size // 8)).from_buffer_copy(parameters))
    found = {name: place for name, place in places.items() if place is not None}
    words = [getattr(kind, name).offset // 8 for name in found]
    for word in (getattr(kind, name).offset // 8 for name in places):
        block[word] = 0
    copy = kind.from_buffer_copy((ctypes.c_int64 * len(block))(*block))
    lock = threading.Lock()

    def launch(stream: int, *addresses: int) -> None:
        with lock:
            for name, address in zip(found, addresses, strict=True):
                setattr(copy, name, address)
            kernel(grid, threads, stream, copy)

    call = kernel.function, grid, 1, 1, threads, kernel.shared_bytes
    return KernelItem(launch, call, [0], block, list(zip(words, found.values(), strict=True)))


class Zeros:
    """``count`` bytes at a place become 0."""

    kind = _ZEROS

    def __init__(self, place: Place, count: int):
        self._place, self._count = place, count

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        array = arrays[self._place.array]
        assert array is not None
        start, size = array.storage_offset() + self._place.offset // array.itemsize, self._count // array.itemsize
        array.as_strided((size,), (1,), start).zero_()

    def words(self) -> list[int]:
        return [*self._place, self._count]


class Product:
    """out (+)= a @ b; a and b are of ``dtype``, out of ``wide``, rounded once."""

    kind = _PRODUCT

    def __init__(
        self, a: Matrix, b: Matrix, out: Matrix, dtype: torch.dtype, wide: torch.dtype, on_gpu: bool,
        accumulate: bool = False,
    ):  # fmt: skip
        self._a, self._b, self._out, self._dtype, self._wide, self._accumulate = a, b, out, dtype, wide, accumulate
        self._into = product_into(dtype, wide, on_gpu)

    def run(self, stream: int, arrays: Sequence[Tensor | None], at: list[int]) -> None:
        a, b, out = (m.of(arrays) for m in (self._a, self._b, self._out))
        if self._accumulate:
            out.addmm_(a, b)
        else:
            self._into(a, b, out=out)

    def words(self) -> list[int] | None:
        a, b, out, dtype, wide = self._a, self._b, self._out, self._dtype, self._wide
        sizes = cublas.row_major((a.shape, a.strides), (b.shape, b.strides), (out.shape[1], out.strides[0]))
        if sizes is None:
            return None
        places = [
            number
            for m, t in ((b, dtype), (a, dtype), (out, wide))
            for number in (m.array, m.start * t.itemsize)
        ]  # fmt: skip
        types = cublas.TYPES[dtype], cublas.TYPES[wide]
        return [*sizes, *types, int(self._accumulate), *places, cublas.ALGORITHMS[dtype]]


@functools.cache
def _functions() -> Any:
    """What `launch_list.cpp` calls: addresses; None where a library is missing."""
    blas = cublas.functions()
    if blas is None or not native.is_available():
        return None
    return (ctypes.c_void_p * 4)(*nvrtc.functions(), *blas)


def why_one_by_one() -> str | None:
    """Why lists are enqueued item by item from Python on this machine, which costs the host time; None: they are
    not."""
    if not native.is_available():
        return "the native library is not installed"
    return None if cublas.functions() is not None else "torch's cuBLAS was not found in libtorch_cuda.so"


class LaunchList:
    """See above.

    Args:
        items: in order.
        arrays: how many a call has.
        dtype: of the products' factors.
        device: the GPU's index.
    """

    def __init__(self, items: Sequence[Item], arrays: int, dtype: torch.dtype, device: int):
        self._items, self._dtype, self._device = list(items), dtype, device
        self._has_products = any(type(item) is Product for item in items)
        self._functions = _functions()
        self._words: Any = None
        # Runs of items that the library reads, the words at which they begin and end; and the items between them.
        self._spans: list[Any] = []
        if self._functions is not None:
            flat: list[int] = []
            each = [(item, item.words()) for item in self._items]
            for read, run in itertools.groupby(each, lambda pair: pair[1] is not None):
                if not read:
                    self._spans += [item for item, _ in run]
                    continue
                begin = len(flat)
                for item, words in run:
                    assert words is not None
                    flat += [item.kind, len(words) + 2, *words]
                self._spans.append((begin, len(flat)))
            if flat:
                self._words = (ctypes.c_int64 * len(flat))(*flat)
                self._run = native.launcher()
                self._addresses = ctypes.c_uint64 * arrays

    def __call__(self, arrays: Sequence[Tensor | None]) -> None:
        """Enqueue the work on the current stream; the device is the current one."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        at = [0 if t is None else t.data_ptr() for t in arrays]
        if self._words is None:
            for item in self._items:
                item.run(stream, arrays, at)
            return
        handle, mode = 0, -1
        if self._has_products:
            handle, mode = cublas.handle(), cublas.math_mode(self._dtype)
        addresses = self._addresses(*at)
        for span in self._spans:
            if type(span) is tuple:
                begin, end = span
                failure = self._run(self._functions, self._words, begin, end, addresses, stream, handle, mode)
                if failure:
                    self._again(failure, end, addresses, stream, handle, mode)
            else:
                span.run(stream, arrays, at)

    def _again(self, failure: int, end: int, addresses: Any, stream: int, handle: int, mode: int) -> None:
        """From the item on that failed: a thread of autograd's may not have the device's context yet."""
        begin, code = divmod(failure, 65536)
        kind = self._words[begin]
        if kind != _PRODUCT and code == nvrtc.INVALID_CONTEXT:
            nvrtc.use_context(torch.cuda.current_device())
            failure = self._run(self._functions, self._words, begin, end, addresses, stream, handle, mode)
            if not failure:
                return
            begin, code = divmod(failure, 65536)
            kind = self._words[begin]
        if kind == _PRODUCT:
            raise RuntimeError(f"cuBLAS failed with status {code} in cublasGemmEx")
        raise RuntimeError(f"kernel launch failed: {nvrtc.error_name(code)}")
