"""A split scan: the scan of `cuda.py` for a caller that learns the initial state only after it has reported the row's
aggregate.

So it is where a sequence is sharded over GPUs. A row in chunks is scanned in two launches anyway: aggregates of the
chunks, then the chunks. `Forward` and `Backward` make the first, report the whole row's aggregate, and take the initial
state (or the final state's gradient) for the second. Neither does more work than the scan itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.selective_scan import cuda, cuda_launch
from mambakit.ops.selective_scan.cuda_backward import BackwardLaunch
from mambakit.ops.selective_scan.cuda_forward import ForwardLaunch, Phase


def serves(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels here can do this call."""
    return u.is_cuda and cuda.other_implementation(u, A) is None


class Forward:
    """A forward of which only the initial state is missing; the arguments are those of `mambakit::selective_scan`.

    Attributes:
        decay, state: (b, d, n) float32, the aggregate: the final state is ``decay * initial + state``. Of packed
            sequences, (1, d, n): from the initial state of the first to the final state of the last; all others begin
            from zero.
    """

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, interval):
        b, length, d = u.shape
        n = A.shape[1]
        self._interval = interval
        self._sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        with torch.cuda.device_of(u):
            launch = ForwardLaunch(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, None, interval, False, True
            )  # fmt: skip
            launch.number_sequences(None, None)
            launch.launch((Phase.SPLIT_AGGREGATES,), None, None, None, None)
        assert launch.scratch is not None  # a split scan has aggregates
        self._launch = launch
        chunks, padded = launch.kernel.chunks, launch.kernel.padded_states
        carries, sums = cuda_launch.scratch_arrays(launch.scratch, (b, chunks, d, padded), (b, chunks, d))
        after = torch.zeros_like(sums)  # sum(delta) of the chunks after each
        after[:, :-1] = sums[:, 1:].flip(1).cumsum(1).flip(1)
        self.decay = torch.exp(sums.sum(1)[..., None] * A)
        shares = torch.exp(after[..., None] * A) * carries[..., :n]
        if cu_seqlens is not None:
            begin = cu_seqlens[-2]
            ends = torch.arange(1, chunks + 1, dtype=torch.int64, device=u.device) * launch.kernel.chunk_length
            shares = torch.where(((ends > begin) & (begin < length))[:, None, None], shares, 0.0)
            if self._sequences > 1:
                self.decay = torch.zeros_like(self.decay)
        self.state = shares.sum(1)

    def finish(self, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state and the checkpoints.

        ``initial`` (b, d, n), or (s, d, n) packed, zero but for the first sequence.
        """
        initial = cuda_launch.dense(initial)
        with torch.cuda.device_of(initial):
            final = torch.empty_like(initial)
            y, checkpoints = self._launch.new_outputs(initial.shape[2], self._interval)
            self._launch.number_sequences(initial, final)
            self._launch.launch((Phase.SPLIT_CHUNKS,), initial, y, final, checkpoints)
        return y, final, checkpoints


class Backward:
    """A gradient of which only that of the final state is missing; the arguments are those of
    `mambakit::selective_scan_backward`.

    Attributes:
        gradient: (b, d, n) float32, the initial state's gradient if the final state's were zero. Of packed sequences,
            (1, d, n): the first one's.
    """

    def __init__(
        self, dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
    ):  # fmt: skip
        b, _, d = u.shape
        n = A.shape[1]
        with torch.cuda.device_of(u):
            launch = BackwardLaunch(
                dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints,
                interval, True,
            )  # fmt: skip
            launch.number_sequences(None)
            launch.launch_carries(None)
        self._launch = launch
        chunks = launch.kernel.chunks
        carries, sums = cuda_launch.scratch_arrays(
            launch.scratch, (b, chunks, d, n), (b, chunks, d), start=launch.carries_start
        )  # fmt: skip
        before = torch.zeros_like(sums)  # sum(delta) of the chunks before each
        before[:, 1:] = sums[:, :-1].cumsum(1)
        shares = torch.exp(before[..., None] * A) * carries
        if cu_seqlens is not None:
            starts = torch.arange(chunks, dtype=torch.int64, device=u.device) * launch.kernel.chunk_length
            shares = torch.where((starts < cu_seqlens[1])[:, None, None], shares, 0.0)
        self.gradient = shares.sum(1)

    def finish(self, dfinal: Tensor) -> tuple[Tensor, ...]:
        """The gradients, in the op's order.

        ``dfinal`` (b, d, n), or (s, d, n) packed, zero but for the last sequence.
        """
        dfinal = cuda_launch.dense(dfinal)
        with torch.cuda.device_of(dfinal):
            self._launch.number_sequences(dfinal)
            return self._launch.gradients(dfinal)
