"""The CUDA C++ scan launched with addresses alone, for calls of one shape and one set of strides.

`ForwardLaunch` and `BackwardLaunch` put a launch together at each call, checks included. What they have put together
for a first call serves later ones here; only addresses are stored anew. Rows are whole (not packed), and start from a
zero state or from a pool of states that is updated in place.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops.selective_scan import cuda_launch
from mambakit.ops.selective_scan.cuda_backward import BackwardLaunch
from mambakit.ops.selective_scan.cuda_forward import ForwardLaunch


class Inputs(NamedTuple):
    """Tensors of the layout that later calls have, as `mambakit::selective_scan` takes them; softplus is on."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None


class PreparedForward:
    """The forward scan.

    Args:
        interval: tokens between checkpoints, 0 for none.

    Attributes:
        scratch_bytes: memory that a call needs beside its results, 16 bytes aligned.
        checkpoint_count: float32 elements of the checkpoints.
    """

    def __init__(self, inputs: Inputs, interval: int):
        u, delta, A, B, C, D, z, bias = inputs
        b, length, d = u.shape
        launch = ForwardLaunch(u, delta, A, B, C, D, z, bias, True, None, None, interval, False, False)
        self._kernel, self._parameters, self._device = launch.kernel, launch._parameters, u.device
        self._chains = b * launch.kernel.channel_tiles if launch.kernel.chained else 0
        self.scratch_bytes, self._carries, self._sums = 0, 0, 0
        if launch.scratch is not None:
            start = launch.scratch.data_ptr()
            self.scratch_bytes = launch.scratch.numel()
            self._carries = int(launch._parameters.carries) - start
            self._sums = int(launch._parameters.delta_sums) - start
        self.checkpoint_count = b * -(-length // interval) * d * A.shape[1] if interval else 0
        self._lock = threading.Lock()

    def __call__(self, stream: int, at: tuple[int, ...], scratch: int) -> None:
        """Launch with the addresses of u, delta, A, B, C, D, z, bias, initial (0: zeros; it may be ``final``), y, final
        and checkpoints (0: none)."""
        tickets = cuda_launch.new_tickets(self._chains, self._device) if self._chains else None
        with self._lock:
            p = self._parameters
            p.u, p.delta, p.A, p.B, p.C, p.D, p.z, p.bias, p.initial, p.y, p.final, p.checkpoints = at
            if self.scratch_bytes:
                p.carries, p.delta_sums = scratch + self._carries, scratch + self._sums
            if tickets is not None:
                p.tickets = tickets.data_ptr()
            for phase in self._kernel.phases:
                p.phase = phase
                self._kernel.launch(stream, p)


class PreparedBackward:
    """The gradient of the forward from a zero state, without one of the final state.

    Args:
        dy: (b, l, d); ``dz`` (b, l, d), of the layout that later calls have.
        row: elements from a row of dB, and of dC, to the next.

    Attributes:
        scratch_bytes: as `PreparedForward`'s.
    """

    def __init__(self, inputs: Inputs, dy: Tensor, dz: Tensor | None, checkpoints: Tensor, interval: int, row: int):
        u, delta, A, B, C, D, z, bias = inputs
        launch = BackwardLaunch(
            dy, u, delta, A, B, C, D, z, bias, True, None, None, checkpoints, interval, False, dz
        )  # fmt: skip
        self._kernel, self._device = launch.kernel, u.device
        self._parameters, self._reduce_parameters = launch._parameters, launch._reduce_parameters
        self._reduce_parameters.row_t = row
        self._chains = u.shape[0] * launch.kernel.channel_tiles if launch.kernel.chained else 0
        self._carried = launch.kernel.chunks > 1 and not launch.kernel.chained
        start, self.scratch_bytes = launch.scratch.data_ptr(), launch.scratch.numel()
        self._scratch = [
            int(getattr(launch._parameters, name)) - start
            for name in ("partial", "dA_parts", "dD_parts", "dbias_parts", "carries", "delta_sums")
        ]
        self._lock = threading.Lock()

    def __call__(self, stream: int, at: tuple[int, ...], scratch: int) -> None:
        """Launch with the addresses of dy, u, delta, A, B, C, D, z, bias and checkpoints, and of the results: du,
        ddelta, dz, dA, dB, dC, dD, dbias; last (d, n) that dA is multiplied by, or 0."""
        tickets = cuda_launch.new_tickets(self._chains, self._device) if self._chains else None
        partial, dA_parts, dD_parts, dbias_parts, carries, sums = [scratch + offset for offset in self._scratch]
        with self._lock:
            p, r = self._parameters, self._reduce_parameters
            (
                p.dy, p.u, p.delta, p.A, p.B, p.C, p.D, p.z, p.bias, p.checkpoints, p.du, p.ddelta, p.dz,
                r.dA, r.dB, r.dC, r.dD, r.dbias, r.dA_scale,
            ) = at  # fmt: skip
            p.partial = r.partial = partial
            p.dA_parts = r.dA_parts = dA_parts
            p.dD_parts = r.dD_parts = dD_parts
            p.dbias_parts = r.dbias_parts = dbias_parts
            p.carries, p.delta_sums = carries, sums
            if tickets is not None:
                p.tickets = tickets.data_ptr()
            if self._carried:
                self._kernel.launch_carries(stream, p)
            self._kernel.launch(stream, p)
            self._kernel.launch_reduce(stream, r)


def checkpoints(inputs: Inputs, interval: int) -> Tensor:
    """Memory for the checkpoints of such a call."""
    b, length, d = inputs.u.shape
    shape = b, -(-length // interval), d, inputs.A.shape[1]
    return torch.empty(shape, dtype=torch.float32, device=inputs.u.device)
