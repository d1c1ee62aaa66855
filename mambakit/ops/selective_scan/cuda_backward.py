"""The gradient of the scan in CUDA C++: the kernels for a shape, and one call of them.

`backward.cuh` says how they work.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambakit.ops._backends import memory, nvrtc
from mambakit.ops._backends.memory import FLOAT32, INT32
from mambakit.ops.selective_scan import cuda_launch, selection
from mambakit.ops.selective_scan.cuda_parameters import BackwardParams, ReduceParams
from mambakit.ops.selective_scan.plan import PLAIN, backward_plan


class BackwardKernel:
    """The gradient's kernels for calls of one shape: their plan, shared memory, grids and machine code.

    Args:
        aligned: as `cuda_launch.Operands` has it, at most 4.
        split: for a split scan, which needs the aggregates of all chunks.
        groups, variant: as `cuda_launch.Operands` has them.

    Raises:
        RuntimeError: a split scan of so many states that a CTA's shared memory does not suffice.
    """

    def __init__(
        self, b, length, d, n, dtype, gated, softplus, packed, aligned, device, interval, split, groups=1, variant=PLAIN
    ):  # fmt: skip
        shared, chained = nvrtc.shared_memory(device), not (packed or split)
        multiprocessors = cuda_launch.multiprocessors(device)
        plan = backward_plan(b * groups, length, d // groups, n, multiprocessors, shared, chained)
        self.shared_bytes = plan.backward_bytes
        if self.shared_bytes > shared:  # only a split scan: `cuda.backward` serves others by Triton
            raise RuntimeError(
                f"the gradient of {n} states in a row that is spread over GPUs takes {self.shared_bytes} bytes of "
                f"shared memory, and a block of this one has {shared}: give each GPU whole rows"
            )
        self.chunk_length = cuda_launch.chunk_length(length, plan.chunks, interval)
        self.chunks = -(-length // self.chunk_length)
        self.first_chunk = 0 if split else 1  # of those whose aggregates the look-back needs
        self.group_tiles = -(-d // groups // plan.cta_channels)
        self.channel_tiles = groups * self.group_tiles
        self.padded_states = plan.lanes * plan.states
        self.chained = plan.resident > 0
        self.threads = 32 * plan.warps
        chains = b * self.channel_tiles
        self.grid, self.carries_grid = chains * self.chunks, chains * (self.chunks - self.first_chunk)
        # Quads of dB and dC, then single elements of dA, dD and ddelta_bias.
        self.rows = 0 if variant.constant == 3 else b * length  # that have a gradient of B or C
        quads = groups * self.rows * self.padded_states // 2
        self.reduce_grid = -(-quads // 256) + -(-(d * n + 2 * d) // 256)
        module = cuda_launch.compiled(plan.backward_macros(dtype, gated, softplus, packed, aligned, variant), device)
        # Of each launch the kernel, CTAs and threads.
        self.scan = module.kernel("selective_scan_backward", self.shared_bytes), self.grid, self.threads
        self.carries = module.kernel("selective_scan_backward_carries"), self.carries_grid, self.threads
        self.reduce = module.kernel("selective_scan_reduce"), self.reduce_grid, 256
        self.sequences = module.kernel("selective_scan_sequences")

    def launch_carries(self, stream: int, parameters) -> None:
        kernel, grid, threads = self.carries
        kernel(grid, threads, stream, parameters)

    def launch(self, stream: int, parameters) -> None:
        kernel, grid, threads = self.scan
        kernel(grid, threads, stream, parameters)

    def launch_reduce(self, stream: int, parameters) -> None:
        kernel, grid, threads = self.reduce
        kernel(grid, threads, stream, parameters)


# One look-up per call: host time is what small calls wait for.
backward_kernel = functools.lru_cache(4096)(BackwardKernel)


class BackwardLaunch:
    """One gradient: its inputs by stride, its kernels, memory for its results and scratch memory for partial sums.

    Attributes:
        kernel: the `BackwardKernel`. scratch: memory of which `carries` and `delta_sums` begin at the byte
        ``carries_start`` (`cuda_launch.scratch_arrays`).
    """

    def __init__(
        self, dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
        split, dz=None,
    ):  # fmt: skip
        device, at = u.device, u.get_device()
        b, length, d = u.shape
        n = A.shape[1]
        inputs = cuda_launch.operands(d, n, u.itemsize, B, C, dy=dy, u=u, delta=delta, z=z)
        A, D, delta_bias, initial = map(cuda_launch.dense_or_none, (A, D, delta_bias, initial_state))
        self.kernel = kernel = backward_kernel(
            b, length, d, n, u.dtype, z is not None, delta_softplus, cu_seqlens is not None, min(inputs.aligned, 4),
            device.index, interval, split, inputs.groups, inputs.variant,
        )  # fmt: skip
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        parts = b * kernel.chunks  # of the sums over rows and time
        sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._results(u, A, D, delta_bias, initial, z, dz, sequences, inputs, parts)
        carried = parts if kernel.chunks > 1 or split else 0
        self.scratch, places = cuda_launch.scratch(
            device, kernel.channel_tiles * kernel.rows * 2 * kernel.padded_states, parts * d * n, parts * d, parts * d,
            carried * d * n, carried * d,
        )  # fmt: skip
        names = ("partial", "dA_parts", "dD_parts", "dbias_parts", "carries", "delta_sums")
        scratch = dict(zip(names, places, strict=True))
        self.carries_start = scratch["carries"] - self.scratch.data_ptr()
        tickets = cuda_launch.new_tickets(b * kernel.channel_tiles, device) if kernel.chained else None
        self._packed = cuda_launch.PackedRow(cu_seqlens, length, device)
        self._selection, self._rows, self._length = (B, C), b, length
        self._kept = inputs, A, D, delta_bias, initial, checkpoints, tickets  # alive until the launches
        self._device, self._state_size = at, d * n
        address, half = nvrtc.address, (u.dtype,)
        constant = inputs.variant.constant
        B_parts, C_parts = self.dB if constant & 1 else None, self.dC if constant & 2 else None
        B_rows, C_rows = None if constant & 1 else self.dB, None if constant & 2 else self.dC
        dz_b, dz_t = (0, 0) if z is None else self.dz.stride()[:2]
        dz_rows = self.dz.transpose(1, 2) if inputs.variant.transposed & 4 else self.dz
        self._parameters = BackwardParams(
            **inputs.fields, **scratch, A=address(A, FLOAT32, at), D=address(D, FLOAT32, at),
            bias=address(delta_bias, FLOAT32, at), initial=address(initial, FLOAT32, at),
            checkpoints=address(checkpoints, FLOAT32, at), ids=self._packed.ids, cu=self._packed.cu,
            du=cuda_launch.dense_address(self.du, half, at), ddelta=cuda_launch.dense_address(self.ddelta, half, at),
            # dz may be half of a wider tensor.
            dz=memory.address_of_rows(dz_rows, half, dz_rows.shape, at), dz_b=dz_b, dz_t=dz_t,
            dB_parts=address(B_parts, FLOAT32, at), dC_parts=address(C_parts, FLOAT32, at),
            dinitial=0 if initial is None else address(self.dinitial, FLOAT32, at), tickets=address(tickets, INT32, at),
            l=length, d=d, n=n, channel_tiles=kernel.channel_tiles, chunk_length=kernel.chunk_length,
            chunks=kernel.chunks, first_chunk=kernel.first_chunk, rows=b * length, interval=interval,
            group_tiles=kernel.group_tiles, group_channels=d // inputs.groups,
        )  # fmt: skip
        self._reduce_parameters = ReduceParams(
            **{name: scratch[name] for name in names[:4]}, dB=address(B_rows, half, at), dC=address(C_rows, half, at),
            dA=address(self.dA, FLOAT32, at), dD=address(self.dD, FLOAT32, at), dbias=address(self.dbias, FLOAT32, at),
            rows=kernel.rows, channel_tiles=kernel.group_tiles, n=n, d=d, parts=parts, groups=inputs.groups,
            row_t=n,
        )  # fmt: skip

    def _results(self, u, A, D, delta_bias, initial, z, dz, sequences: int, inputs, parts: int) -> None:
        """Memory for the gradients."""
        (b, length, d), (_, n), device = u.shape, A.shape, u.device

        def like_u(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=u.dtype, device=device)

        def float32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        transposed, constant = inputs.variant.transposed, inputs.variant.constant
        self.du, self.ddelta = (cuda_launch.memory_of(u, bool(transposed & bit)) for bit in (1, 2))
        if z is None:
            self.dz = like_u(0)
        else:
            self.dz = cuda_launch.memory_of(u, bool(transposed & 4)) if dz is None else dz
        groups = () if inputs.groups == 1 else (inputs.groups,)
        self.dB, self.dC = (
            float32(parts, d, n) if constant & bit else like_u(b, length, *groups, n) for bit in (1, 2)
        )  # fmt: skip
        self.dA, self.dD, self.dbias = float32(d, n), float32(d), float32(d)
        self.dinitial = float32(0) if initial is None else float32(sequences, d, n)
        self._has_D, self._has_bias = D is not None, delta_bias is not None

    def _selected(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient of B or C from what the kernels made: rows, or parts of a constant's."""
        if gradient.shape == x.shape and selection.varies(x, self._length):
            return gradient
        if not selection.varies(x, self._length):
            rows = self._rows
            return selection.reduced(gradient.view(rows, -1, *gradient.shape[1:]).sum(1), x)
        return selection.reduced(gradient if gradient.dim() == 4 else gradient[:, :, None], x)

    def number_sequences(self, dfinal: Tensor | None) -> None:
        """Before the launches of a packed call; the gradient of a sequence without a token is copied through."""
        target = self.dinitial if self.dinitial.numel() else None
        self._packed.number(self.kernel.sequences, self.stream, dfinal, target, self._state_size)

    def launch_carries(self, dfinal: Tensor | None) -> None:
        """The aggregates of chunks, before `gradients` in a scan in chunks that is not chained."""
        self._parameters.dfinal = nvrtc.address(dfinal, FLOAT32, self._device)
        self.kernel.launch_carries(self.stream, self._parameters)

    def gradients(self, dfinal: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients, in the op's order."""
        self._parameters.dfinal = nvrtc.address(dfinal, FLOAT32, self._device)
        self.kernel.launch(self.stream, self._parameters)
        self.kernel.launch_reduce(self.stream, self._reduce_parameters)
        empty = self.dA.new_empty(0)
        dB, dC = (self._selected(*pair) for pair in zip((self.dB, self.dC), self._selection, strict=True))
        return (
            self.du, self.ddelta, self.dA, dB, dC, self.dD if self._has_D else empty, self.dz,
            self.dbias if self._has_bias else empty, self.dinitial,
        )  # fmt: skip
