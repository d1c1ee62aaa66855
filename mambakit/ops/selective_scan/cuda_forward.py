"""The forward scan in CUDA C++: the kernel for a shape, and one call of it. `forward.cuh` says how it works."""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.memory import FLOAT32, INT32
from mambakit.ops.selective_scan import cuda_launch
from mambakit.ops.selective_scan.cuda_parameters import ForwardParams
from mambakit.ops.selective_scan.plan import PLAIN, forward_plan


class Phase(enum.IntEnum):
    """What a launch does; `forward.cuh` explains each."""

    SCAN_ROWS = 0
    SCAN_AGGREGATES = 1
    SCAN_CHUNKS = 2
    SPLIT_AGGREGATES = 3
    SPLIT_CHUNKS = 4


class ForwardKernel:
    """The forward kernel for calls of one shape: its plan, shared memory, grid and machine code.

    Args:
        aligned: as `cuda_launch.Operands` has it.
        interval: tokens between checkpoints, 0 for none.
        one_chunk: rows must not be cut.
        split: for a split scan, which scans all chunks at once.
        groups, variant: as `cuda_launch.Operands` has them.
    """

    def __init__(
        self, b, length, d, n, dtype, gated, softplus, packed, aligned, device, interval, one_chunk, split, groups=1,
        variant=PLAIN,
    ):  # fmt: skip
        chained = not (packed or split)
        plan = forward_plan(
            b * groups, length, d // groups, n, cuda_launch.multiprocessors(device), chained, variant.transposed & 7 > 0
        )
        # A split scan has all chunks in one launch, other scans all but one.
        wanted = 1 if one_chunk else max(plan.chunks - split, 1)
        self.chunk_length = cuda_launch.chunk_length(length, wanted, interval)
        self.chunks = -(-length // self.chunk_length)
        self.group_tiles = -(-d // groups // plan.cta_channels)
        self.channel_tiles = groups * self.group_tiles
        self.padded_states = plan.lanes * plan.states
        self.chained = plan.resident > 0
        self.grid = b * self.channel_tiles * (self.chunks if split or self.chained else max(self.chunks - 1, 1))
        self.threads = 32 * plan.warps
        self.shared_bytes = plan.forward_bytes(dtype.itemsize, gated, variant.transposed)
        if self.chained:
            self.shared_bytes = max(self.shared_bytes, plan.chained_bytes(nvrtc.shared_memory(device)))
        module = cuda_launch.compiled(plan.forward_macros(dtype, gated, softplus, packed, aligned, variant), device)
        # A launch's kernel, CTAs and threads.
        self.scan = module.kernel("selective_scan_forward", self.shared_bytes), self.grid, self.threads
        self.sequences = module.kernel("selective_scan_sequences")
        self.phases: tuple[Phase, ...] = (Phase.SCAN_ROWS,)
        if self.chunks > 1 and not self.chained:
            self.phases = (Phase.SCAN_AGGREGATES, Phase.SCAN_CHUNKS)

    def launch(self, stream: int, parameters) -> None:
        kernel, grid, threads = self.scan
        kernel(grid, threads, stream, parameters)


# One look-up per call: host time is what small calls wait for.
forward_kernel = functools.lru_cache(4096)(ForwardKernel)


class ForwardLaunch:
    """One forward call: its inputs by stride, its kernel, and scratch memory for carries.

    Attributes:
        kernel: the `ForwardKernel`.
        scratch: where `carries` and `delta_sums` are (`cuda_launch.scratch_arrays`), or None.
    """

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, slots, interval, one_chunk, split):
        device = u.device
        b, length, d = u.shape
        n = A.shape[1]
        inputs = cuda_launch.operands(d, n, u.itemsize, B, C, u=u, delta=delta, z=z)
        A, D, delta_bias, slots = map(cuda_launch.dense_or_none, (A, D, delta_bias, slots))
        self.kernel = kernel = forward_kernel(
            b, length, d, n, u.dtype, z is not None, softplus, cu_seqlens is not None, inputs.aligned, device.index,
            interval, one_chunk, split, inputs.groups, inputs.variant,
        )  # fmt: skip
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        self.scratch, carries, delta_sums = None, 0, 0
        if kernel.chunks > 1 or split:
            rows = b * kernel.chunks * d
            self.scratch, (carries, delta_sums) = cuda_launch.scratch(device, rows * kernel.padded_states, rows)
        tickets = cuda_launch.new_tickets(b * kernel.channel_tiles, device) if kernel.chained else None
        self._packed = cuda_launch.PackedRow(cu_seqlens, length, device)
        self._kept = inputs, A, D, delta_bias, slots, tickets  # alive until the launches
        self._device, self._dtype, self._state_size = u.get_device(), (u.dtype,), d * n
        address, at = nvrtc.address, self._device
        self._parameters = ForwardParams(
            **inputs.fields, A=address(A, FLOAT32, at), D=address(D, FLOAT32, at),
            bias=address(delta_bias, FLOAT32, at), slots=address(slots, INT32, at), ids=self._packed.ids,
            cu=self._packed.cu, carries=carries, delta_sums=delta_sums, tickets=address(tickets, INT32, at), l=length,
            d=d, n=n, channel_tiles=kernel.channel_tiles, chunk_length=kernel.chunk_length, chunks=kernel.chunks,
            interval=interval, group_tiles=kernel.group_tiles, group_channels=d // inputs.groups,
        )  # fmt: skip
        self._like, self._transposed = u, bool(inputs.variant.transposed & 1)

    def number_sequences(self, source: Tensor | None, target: Tensor | None) -> None:
        """Before the launches of a packed call; sequences without a token keep their state, which is copied."""
        self._packed.number(self.kernel.sequences, self.stream, source, target, self._state_size)

    def new_outputs(self, n: int, interval: int) -> tuple[Tensor, Tensor]:
        """Memory for y, and for the checkpoints."""
        b, length, d = self._like.shape
        shape = (b, -(-length // interval), d, n) if interval else (0,)
        checkpoints = torch.empty(shape, dtype=torch.float32, device=self._like.device)
        return cuda_launch.memory_of(self._like, self._transposed), checkpoints

    def launch(
        self, phases: tuple[Phase, ...], initial: Tensor | None, y: Tensor | None, final: Tensor | None,
        checkpoints: Tensor | None,
    ) -> None:  # fmt: skip
        parameters, device = self._parameters, self._device
        parameters.initial = nvrtc.address(initial, FLOAT32, device)
        parameters.y = 0 if y is None else cuda_launch.dense_address(y, self._dtype, device)
        parameters.final = nvrtc.address(final, FLOAT32, device)
        parameters.checkpoints = nvrtc.address(checkpoints, FLOAT32, device)
        for phase in phases:
            parameters.phase = phase
            self.kernel.launch(self.stream, parameters)
