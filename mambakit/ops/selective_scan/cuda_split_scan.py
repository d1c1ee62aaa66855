"""The scan of `cuda.py` in two parts, for a caller that learns the state which enters a row only after it has told what leaves it.

Cut into chunks, a row is walked twice anyway: once to find what each chunk adds to a state and how it decays, and once for
good. `Forward` and `Backward` hand over what the first walk found, of the whole row, and take the state (or its gradient) for the
second. Neither walks more than the scan itself does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.selective_scan import cuda


def serves(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels here can do this call."""
    return u.is_cuda and cuda._elsewhere(u, A) is None


class Forward:
    """A forward of which only the initial state is missing; the arguments are those of `mambakit::selective_scan`.

    Attributes:
        decay, state: (b, d, n) float32, the state that leaves is ``decay * initial + state``. Of packed sequences, (1, d, n):
            between the initial state of the first and the final state of the last; all others begin from zero.
    """

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval):
        b, length, d = u.shape
        n = A.shape[1]
        self._u, self._interval = u, interval
        self._sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        with torch.cuda.device_of(u):
            launch = cuda.ForwardLaunch(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, None, interval, False, True
            )  # fmt: skip
            launch.number_sequences(None, None)
            launch.launch((3,), None, None, None, None)
        assert launch.scratch is not None  # in parts there is always something to hand over
        self._launch = launch
        chunks, padded = launch.call.chunks, launch.call.padded
        local, sums = cuda.shared_floats(launch.scratch, (b, chunks, d, padded), (b, chunks, d))
        after = torch.zeros_like(sums)  # the time steps to the right of each chunk
        after[:, :-1] = sums[:, 1:].flip(1).cumsum(1).flip(1)
        self.decay = torch.exp(sums.sum(1)[..., None] * A)
        shares = torch.exp(after[..., None] * A) * local[..., :n]
        if cu_seqlens is not None:
            begin = cu_seqlens[-2]
            counts = torch.arange(1, chunks + 1, dtype=torch.int64, device=u.device) * launch.call.chunk_length > begin
            shares = torch.where((counts & (begin < length))[:, None, None], shares, 0.0)
            if self._sequences > 1:
                self.decay = torch.zeros_like(self.decay)
        self.state = shares.sum(1)

    def finish(self, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state and the checkpoints. ``initial`` (b, d, n), or (s, d, n) packed, zero but for the first sequence."""
        initial = cuda.dense(initial)
        with torch.cuda.device_of(initial):
            final = torch.empty_like(initial)
            y, checkpoints = cuda.new_outputs(self._u, initial.shape[2], self._interval)
            self._launch.number_sequences(initial, final)
            self._launch.launch((4,), initial, y, final, checkpoints)
        return y, final, checkpoints


class Backward:
    """A gradient of which only that of the final state is missing; the arguments are those of `mambakit::selective_scan_backward`.

    Attributes:
        gradient: (b, d, n) float32, what the outputs' gradient has in the initial state. Of packed sequences, (1, d, n): in
            the first one's.
    """

    def __init__(
        self, dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
    ):  # fmt: skip
        b, _, d = u.shape
        n = A.shape[1]
        with torch.cuda.device_of(u):
            launch = cuda.BackwardLaunch(
                dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
                True,
            )  # fmt: skip
            launch.number_sequences(None)
            launch.arrive(None)
        self._launch = launch
        chunks = launch.call.chunks
        *_, place, _ = launch.places  # of what chunks hand to each other, in the scratch memory
        local, sums = cuda.shared_floats(
            launch.scratch, (b, chunks, d, n), (b, chunks, d), start=place - launch.scratch.data_ptr()
        )  # fmt: skip
        before = torch.zeros_like(sums)  # the time steps to the left of each chunk
        before[:, 1:] = sums[:, :-1].cumsum(1)
        shares = torch.exp(before[..., None] * A) * local
        if cu_seqlens is not None:
            counts = torch.arange(chunks, dtype=torch.int64, device=u.device) * launch.call.chunk_length < cu_seqlens[1]
            shares = torch.where(counts[:, None, None], shares, 0.0)
        self.gradient = shares.sum(1)

    def finish(self, dfinal: Tensor) -> tuple[Tensor, ...]:
        """The gradients, in the op's order. ``dfinal`` (b, d, n), or (s, d, n) packed, zero but for the last sequence."""
        dfinal = cuda.dense(dfinal)
        with torch.cuda.device_of(dfinal):
            self._launch.number_sequences(dfinal)
            return self._launch.finish(dfinal)
