"""What the launches of the CUDA C++ scan share: inputs by stride, scratch memory, and the sequences of a packed row."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import _layout
from mambakit.ops._backends import memory, nvrtc
from mambakit.ops._backends.memory import FLOAT32, INT32
from mambakit.ops.selective_scan import selection
from mambakit.ops.selective_scan.cuda_parameters import SequencesParams
from mambakit.ops.selective_scan.plan import EVEN_ROWS, Variant

_FOLDER = Path(__file__).parent
_STEP = 32  # a chunk has a multiple of this many tokens
# Elements from one token to the next, or from one channel: within a tile the gradient's offsets are 32 bits of bytes.
_FARTHEST, _FARTHEST_CHANNELS = 2**26, 2**24


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def compiled(macros: tuple[tuple[str, int], ...], device: int) -> nvrtc.Module:
    """`kernel.cu` with these macros."""
    return nvrtc.Module(_FOLDER, "kernel.cu", dict(macros), device)


def dense(t: Tensor) -> Tensor:
    """Contiguous, and at an address from which 16 bytes can be read at once."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def dense_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else dense(t)


class Operands(NamedTuple):
    """The inputs of (b, l, ...), which the kernels read by stride."""

    # Kept alive until the launch: copies of those that are not adjacent, or whose tokens or channels are too far apart.
    tensors: list[Tensor | None]
    fields: dict[str, int]  # of the parameter structure: addresses and strides
    aligned: int  # elements that one load may read: 8, 4, or 0 for one by one
    variant: Variant
    groups: int  # of channels that B and C tell apart


_BITS = {"u": 1, "delta": 2, "z": 4, "dy": 8}


def operands(d: int, n: int, itemsize: int, B: Tensor, C: Tensor, **given: Tensor | None) -> Operands:
    """The tensors by their names in the parameter structure; the first of ``given`` says shape, dtype and device."""
    first = next(iter(given.values()))
    assert first is not None
    (b, length, _), dtypes, device = first.shape, (first.dtype,), first.get_device()
    groups = selection.common_groups(B, C, length, d)
    tensors: list[Tensor | None] = []
    fields: dict[str, int] = {}
    odd, transposed, constant, uneven = d // groups | n, 0, 0, length * itemsize
    for name, t in given.items():
        address = row = token = element = 0
        if t is not None and _layout.is_transposed(t) and t.stride(2) < _FARTHEST_CHANNELS:
            address = memory.address_of_rows(t.transpose(1, 2), dtypes, (b, d, length), device)
            row, token, element = t.stride()
            transposed |= _BITS[name]
            uneven |= address | row * itemsize | element * itemsize
        elif t is not None:
            row, token, element = t.stride()
            if element != 1 or token >= _FARTHEST:
                t = t.contiguous()
                row, token, _ = t.stride()
            address, element = memory.address_of_rows(t, dtypes, (b, length, d), device), 0
            odd |= row | token | address // itemsize
        tensors.append(t)
        fields |= {name: address, f"{name}_b": row, f"{name}_t": token, f"{name}_c": element}
    for name, x, bit in (("B", B, 1), ("C", C, 2)):
        rows = b if x.shape[0] == b else 1
        if selection.varies(x, length):
            x = x[:, :, None] if x.dim() == 3 else x
            if x.stride(3) != 1 or x.stride(1) >= _FARTHEST:
                x = x.contiguous()
            row, token, group, _ = x.stride()
            row, group = row if x.shape[0] == b else 0, group if x.shape[2] > 1 else 0
            address = memory.address_of_rows(x, dtypes, (rows, length, x.shape[2], n), device)
            odd |= row | token | group | address // itemsize
        else:
            x = selection.of_channels(x, d)
            address, row, token, group = memory.address(x, FLOAT32, rows * d * n, device), 0, 0, 0
            row, constant = d * n if x.shape[0] == b else 0, constant | bit
        tensors.append(x)
        fields |= {name: address, f"{name}_b": row, f"{name}_t": token, f"{name}_g": group}
    if transposed and uneven % 16 == 0:
        transposed |= EVEN_ROWS
    variant = Variant(groups > 1, constant, transposed)
    return Operands(tensors, fields, 0 if odd & 3 else 4 if odd & 7 else 8, variant, groups)


def memory_of(like: Tensor, transposed: bool) -> Tensor:
    """Memory for a result (b, l, d), (b, d, l) in memory where ``transposed``."""
    b, length, d = like.shape
    if transposed:
        return torch.empty((b, d, length), dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty((b, length, d), dtype=like.dtype, device=like.device)


def dense_address(t: Tensor, dtypes: tuple[torch.dtype, ...], device: int) -> int:
    """The address of what `memory_of` made."""
    return nvrtc.address(t if t.is_contiguous() else t.transpose(1, 2), dtypes, device)


def scratch(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """Memory for float32 arrays of these sizes, and the address of each, 16 bytes aligned."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // 4) * 16
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    address = memory.data_ptr()
    return memory, [address + start for start in starts]


def scratch_arrays(memory: Tensor, *shapes: tuple[int, ...], start: int = 0) -> list[Tensor]:
    """The arrays of `scratch` as tensors, from the byte ``start`` on."""
    found = []
    for shape in shapes:
        count = math.prod(shape)
        found.append(memory[start : start + 4 * count].view(torch.float32).view(shape))
        start += -(-count // 4) * 16
    return found


def new_tickets(chains: int, device: torch.device) -> Tensor:
    """`tickets` of a chained scan: the next ticket, and the finished chunks of each chain."""
    return torch.zeros(1 + chains, dtype=torch.int32, device=device)


def chunk_length(length: int, chunks: int, interval: int) -> int:
    """Tokens of a chunk: whole checkpoint intervals."""
    step = max(interval, _STEP)
    return -(-length // (chunks * step)) * step


class PackedRow:
    """The sequences of a packed row; of other rows nothing.

    Attributes:
        cu, ids: addresses of cu_seqlens, and of the sequence of each token, or 0.
    """

    def __init__(self, cu_seqlens: Tensor | None, length: int, device: torch.device):
        self._cu = self._ids = None
        if cu_seqlens is not None:
            self._cu, self._ids = cu_seqlens.contiguous(), torch.empty(length, dtype=torch.int32, device=device)
        self._device = -1 if device.index is None else device.index
        self.cu, self.ids = (nvrtc.address(t, INT32, self._device) for t in (self._cu, self._ids))

    def number(
        self, kernel: nvrtc.Kernel, stream: int, source: Tensor | None, target: Tensor | None, size: int
    ) -> None:
        """Launch selective_scan_sequences:

        ``ids``, and states of ``size`` elements of sequences without a token, copied.
        """
        if self._cu is None or self._ids is None:
            return
        sequences = self._cu.shape[0] - 1
        parameters = SequencesParams(
            cu=self.cu, ids=self.ids, source=nvrtc.address(source, FLOAT32, self._device),
            target=nvrtc.address(target, FLOAT32, self._device), state_size=size,
        )  # fmt: skip
        rounds = min(64, -(-self._ids.shape[0] // (sequences * 1024)) + 1)
        kernel(sequences, 256, stream, parameters, grid_y=rounds)
