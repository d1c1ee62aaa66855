"""One token through a whole model on a CPU for more rows than a `DecodeStep` serves: parts of them, beside each other.

Each part is a `DecodeStep` of up to 16 rows on one thread. Its threads meet at the end of the step alone, where those
of one `DecodeStep` meet after every product.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mambakit.ops._backends import native
from mambakit.ops.decode.cpu import DecodeStep, buffer, handle_of
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear.cpu import MOST_ROWS
from mambakit.ops.linear.packed import PackedWeight


class DecodeParts:
    """``step(x) -> logits``, as a `DecodeStep` of any number of rows. A row's bits are those of a step of it alone.

    Args: those of `DecodeStep`.

    Raises:
        ValueError: states that the kernels cannot use in place, or no row.
        TypeError: weights or states that are not plain memory on the CPU.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        final_norm: Tensor,
        head: PackedWeight,
        eps: float,
        conv_states: Tensor,
        ssm_states: Tensor,
        mixer_eps: float | None = None,
    ):
        b, threads = ssm_states.shape[1], native.threads()
        if b < 1:
            raise ValueError("DecodeParts: the batch is 0; it serves 1 row or more")
        self._threads = min(threads, -(-b // MOST_ROWS))
        # Fewer parts than threads would leave some without work: then all of them compute each part.
        team = 1 if self._threads == threads else threads
        self._states = conv_states, ssm_states
        self._logits = buffer(b, head.out_features)
        self._parts = [
            DecodeStep(
                layers, final_norm, head, eps, conv_states[:, rows], ssm_states[:, rows], mixer_eps, team,
                self._logits[rows],
            )
            for rows in (slice(begin, min(b, begin + MOST_ROWS)) for begin in range(0, b, MOST_ROWS))
        ]  # fmt: skip
        self._others = ThreadPoolExecutor(self._threads - 1) if team == 1 < self._threads else None
        self.handle = handle_of(self)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mambakit.decode.prepared(x, *self._states, self.handle, self._logits.shape[1])

    def run(self, x: Tensor) -> Tensor:
        """The step itself, below the dispatcher."""
        for part, rows in zip(self._parts, x.split(MOST_ROWS), strict=True):
            part.load(rows)
        left = self._parts[::-1]
        others = self._others if native.threads() > 1 else None  # threads do not survive a fork
        helping = [] if others is None else [others.submit(_compute, left) for _ in range(self._threads - 1)]
        _compute(left)
        for one in helping:
            one.result()
        return self._logits.clone()  # the buffer is the next step's


def _compute(left: list[DecodeStep]) -> None:
    """Take parts and compute them until none is left; several threads do so at once."""
    while left:
        try:
            part = left.pop()
        except IndexError:  # another thread took the last one
            return
        part.compute()
