"""The CUDA C++ scan as items of a launch list, for calls of one shape and one set of strides.

`ForwardLaunch` and `BackwardLaunch` put a launch together at each call, checks included. What they have put together
for a first call serves later ones here. Rows are whole (not packed), and start from a zero state or from a pool of
states that is updated in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops._backends.launch_list import Item, Place, Zeros, structure_item
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


class ForwardPlaces(NamedTuple):
    """Where a forward scan's operands and results are; no ``initial``: zeros, and it may be ``final``."""

    u: Place
    delta: Place
    A: Place
    B: Place
    C: Place
    D: Place
    z: Place
    bias: Place
    initial: Place | None
    y: Place
    final: Place
    checkpoints: Place | None


class BackwardPlaces(NamedTuple):
    """Where a gradient's operands and results are. dA is multiplied by ``dA_scale`` (d, n), where there is one."""

    dy: Place
    u: Place
    delta: Place
    A: Place
    B: Place
    C: Place
    D: Place
    z: Place
    bias: Place
    checkpoints: Place
    du: Place
    ddelta: Place
    dz: Place
    dA: Place  # noqa: N815
    dB: Place  # noqa: N815
    dC: Place  # noqa: N815
    dD: Place  # noqa: N815
    dbias: Place
    dA_scale: Place | None  # noqa: N815


_REDUCED = ("dA", "dB", "dC", "dD", "dbias", "dA_scale")  # what the last kernel of a gradient writes or reads


class _Tickets:
    """Memory of a chained scan behind its scratch memory: the next ticket, and the finished chunks of each chain."""

    def __init__(self, chains: int, start: int):
        self.bytes, self._start = (-(-(1 + chains) * 4 // 16) * 16 if chains else 0), start

    def items(self, scratch: Place) -> tuple[list[Item], dict[str, Place | None]]:
        if not self.bytes:
            return [], {}
        place = scratch + self._start
        return [Zeros(place, self.bytes)], {"tickets": place}


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
        self._kernel, self._parameters = launch.kernel, launch._parameters
        self._scratch: dict[str, int] = {}
        self.scratch_bytes = 0
        if launch.scratch is not None:
            start, self.scratch_bytes = launch.scratch.data_ptr(), launch.scratch.numel()
            self._scratch = {name: int(getattr(self._parameters, name)) - start for name in ("carries", "delta_sums")}
        chains = b * launch.kernel.channel_tiles if launch.kernel.chained else 0
        self._tickets = _Tickets(chains, self.scratch_bytes)
        self.scratch_bytes += self._tickets.bytes
        self.checkpoint_count = b * -(-length // interval) * d * A.shape[1] if interval else 0

    def items(self, places: ForwardPlaces, scratch: Place) -> list[Item]:
        found, tickets = self._tickets.items(scratch)
        inner = {name: scratch + start for name, start in self._scratch.items()}
        at = {**places._asdict(), **inner, **tickets}
        for phase in self._kernel.phases:
            self._parameters.phase = phase
            found.append(structure_item(*self._kernel.scan, self._parameters, at))
        return found


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
        self._kernel = launch.kernel
        self._parameters, self._reduce_parameters = launch._parameters, launch._reduce_parameters
        self._reduce_parameters.row_t = row
        self._carried = launch.kernel.chunks > 1 and not launch.kernel.chained
        start, count = launch.scratch.data_ptr(), launch.scratch.numel()
        self._scratch = {
            name: int(getattr(launch._parameters, name)) - start
            for name in ("partial", "dA_parts", "dD_parts", "dbias_parts", "carries", "delta_sums")
        }
        self._tickets = _Tickets(u.shape[0] * launch.kernel.channel_tiles if launch.kernel.chained else 0, count)
        self.scratch_bytes = count + self._tickets.bytes

    def items(self, places: BackwardPlaces, scratch: Place) -> list[Item]:
        found, tickets = self._tickets.items(scratch)
        inner: dict[str, Place | None] = {name: scratch + start for name, start in self._scratch.items()}
        given = places._asdict()
        at = {**{name: place for name, place in given.items() if name not in _REDUCED}, **inner, **tickets}
        of_reduce = {name: given[name] for name in _REDUCED}
        of_reduce |= {name: inner[name] for name in ("partial", "dA_parts", "dD_parts", "dbias_parts")}
        if self._carried:
            found.append(structure_item(*self._kernel.carries, self._parameters, at))
        found.append(structure_item(*self._kernel.scan, self._parameters, at))
        return [*found, structure_item(*self._kernel.reduce, self._reduce_parameters, of_reduce)]


def checkpoints(inputs: Inputs, interval: int) -> Tensor:
    """Memory for the checkpoints of such a call."""
    b, length, d = inputs.u.shape
    shape = b, -(-length // interval), d, inputs.A.shape[1]
    return torch.empty(shape, dtype=torch.float32, device=inputs.u.device)
