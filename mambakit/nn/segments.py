"""Sequences of a batch, cut where states are reset, as one packed row that both directions read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mambakit.modules.packing import Packing


@dataclass(frozen=True)
class Segments:
    """The packed row of b sequences, one after another, and what a reset leaves of each.

    Attributes:
        forward, backward: the packing of a direction: where segments start, and which sequence's state the first one
            (for the backward direction the last one) continues.
        reversal: (total,) int64: the row with each segment reversed.
    """

    forward: Packing
    backward: Packing
    reversal: Tensor


def segments_of(lengths: Tensor, starts: Tensor | None) -> Segments:
    """Segments of b sequences.

    Args:
        lengths: (b,) int64, each 1 or more.
        starts: (total,) bool in the row's order: tokens before which the state is zero. None: nowhere.
    """
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    begins = torch.zeros(total, dtype=torch.bool, device=lengths.device)
    begins[ends - lengths] = True
    is_first = begins.clone()  # of its sequence
    if starts is not None:
        begins |= starts
    at = begins.nonzero().squeeze(1)  # (s,)
    rows = torch.arange(len(lengths), dtype=torch.int64, device=lengths.device)
    owner = torch.repeat_interleave(rows, lengths, output_size=total)[at]
    first = is_first[at]
    last = torch.ones_like(first)
    last[:-1] = first[1:]
    carried = first if starts is None else first & ~starts[at]
    cu_seqlens = torch.cat([at, at.new_tensor([total])])
    number = begins.cumsum(0) - 1  # of each token's segment
    reversal = (
        cu_seqlens[number] + cu_seqlens[number + 1] - 1 - torch.arange(total, dtype=torch.int64, device=at.device)
    )

    def packing(read: Tensor, write: Tensor) -> Packing:
        slots = torch.where(read, owner, -1), torch.where(write, owner, -1)
        return Packing(cu_seqlens.to(torch.int32), *slots, None, (1, total), starts is None)

    return Segments(packing(carried, last), packing(last, first), reversal)


def row_order(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """(order (total,), lengths (b,)), int64 on the data's device: ``packed.data[order]`` is the row of its sequences,
    one after another, longest first."""
    sizes = packed.batch_sizes  # (t,) on the CPU: how many sequences have a token at each time
    times = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int64, device="cpu"), sizes)
    within = torch.arange(len(times), dtype=torch.int64, device="cpu") - (sizes.cumsum(0) - sizes)[times]
    order = torch.argsort(within * len(sizes) + times)
    counts = torch.bincount(within, minlength=int(sizes[0]))
    return order.to(packed.data.device), counts.to(packed.data.device)
