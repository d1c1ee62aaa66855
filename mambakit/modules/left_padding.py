"""Padding before the tokens of each row, whose amount the host need not know: one captured forward serves any lengths.

`mambakit.modules.packing` removes padding, for which the host must know where it is. Here the padding is computed like
tokens and changes no state: the convolution's window is moved next to the first token, and a time step of zero leaves
the SSM state as it is, with the same bits (exp(0 A) h + 0 B u = h).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.ops.fused_mixer.padding import NO_STEP


@dataclass(frozen=True)
class LeftPadding:
    """The padding of a (b, l) batch.

    Args:
        pads: (b,) int64, columns of padding of each row, 0 to ``length``.
        length: l.
        window: k - 1.
    """

    pads: Tensor
    length: int
    window: int

    @functools.cached_property
    def mask(self) -> Tensor:
        """(b, l, 1) bool, the padding."""
        columns = torch.arange(self.length, dtype=torch.int64, device=self.pads.device)
        return (columns < self.pads[:, None])[..., None]

    @functools.cached_property
    def order(self) -> Tensor:
        """(b, k - 1 + l, 1) int64: in a row of the convolution's window (k - 1) and all l columns, which of them stands
        in each place once the window is moved behind the padding. Without a window any column stands for padding."""
        window, pads = self.window, self.pads[:, None]
        columns = torch.arange(window + self.length, dtype=torch.int64, device=pads.device)[None]
        moved = torch.where(columns >= window + pads, columns, (columns - pads).clamp(min=0, max=max(window - 1, 0)))
        return moved[..., None]

    def move(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Put the window next to the first token of each row.

        Args:
            x: (b, l, d), the convolution's input; its padding is overwritten.
            window: (b, d, k - 1), the inputs before ``x``.

        Returns:
            (b, l, d) and (b, d, k - 1), to be convolved in their place.
        """
        size = window.shape[-1]
        row = torch.cat([window.transpose(1, 2), x], 1)
        row = row.gather(1, self.order.expand(-1, -1, row.shape[-1]))
        return row[:, size:], row[:, :size].transpose(1, 2).contiguous()

    def without_steps(self, delta: Tensor) -> Tensor:
        """The time steps (b, l, d) before their softplus, whose softplus is 0 at padding."""
        return delta.masked_fill(self.mask, NO_STEP)
