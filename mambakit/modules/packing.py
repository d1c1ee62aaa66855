"""Packing: padding, restarts and documents as sequences in a single row without padding.

A batch with an attention mask, position_ids that restart, or cu_seqlens becomes one row (1, total, h) of the real
tokens, with the offsets where sequences start. That is exact for any mask (left, right, ragged, holes), does no work on
padding, and is the ops' own layout (``cu_seqlens``).

In a traced call no shape may depend on the mask: the row then has all b * l tokens, and its last sequence is the
padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mambakit.modules.tracing import values_are_hidden
from mambakit.ops._releases import is_exporting


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a (b, l) batch are in one packed row, and which slot of the state each sequence continues.

    Attributes:
        cu_seqlens: (s + 1,) int32, where sequences start in the packed row.
        read: (s,) int64, the slot of a sequence's initial state; -1 starts from zeros.
        write: (s,) int64, the slot of its final state; -1 drops it.
        tokens: (total,) int64, the flat position b*l of each packed token; None when the batch is the packed row.
        shape: (b, l) of the batch.
        in_place: ``read`` and ``write`` are equal, so that the in-place ops can run.
        keep: (b, l) bool, the real tokens, where the packed row holds the padding, too; else None.
    """

    cu_seqlens: Tensor
    read: Tensor
    write: Tensor
    tokens: Tensor | None
    shape: tuple[int, int]
    in_place: bool
    keep: Tensor | None = None
    _elsewhere: dict[torch.device, Packing] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int]) -> Packing:
        """Sequences that the caller packed; sequence i belongs to slot i."""
        rows = torch.arange(cu_seqlens.shape[0] - 1, dtype=torch.int64, device=cu_seqlens.device)
        return Packing(cu_seqlens, rows, rows, None, shape, True)

    @staticmethod
    def from_batch(
        keep: Tensor | None, starts: Tensor | None, continues: bool, shape: tuple[int, int]
    ) -> Packing | None:
        """Pack a batch.

        Args:
            keep: (b, l) bool, the real tokens; all when None.
            starts: (b, l) bool, tokens that begin a new document; none when None.
            continues: the state holds tokens before the batch, so that a row's first token may continue a document.

        Returns:
            None where nothing has to be packed: all tokens are real and no document begins inside a row.
        """
        given = keep if keep is not None else starts
        assert given is not None
        if not values_are_hidden(given):
            return _by_values(keep, starts, continues, shape)
        if starts is None:
            return _by_shape(given, shape)
        from mambakit.modules.untraced import NOT_TRACED, between_graphs

        if torch.compiler.is_compiling() and not is_exporting():
            return between_graphs(_by_values, keep, starts, continues, shape)
        raise ValueError(NOT_TRACED)

    def on(self, device: torch.device) -> Packing:
        """This packing on the device of a layer, for a model on several devices."""
        if self.cu_seqlens.device == device:
            return self
        if device not in self._elsewhere:
            moved = {
                name: value.to(device)
                for name in ("cu_seqlens", "read", "write", "tokens", "keep")
                if (value := getattr(self, name)) is not None
            }
            self._elsewhere[device] = replace(self, **moved, _elsewhere={})
        return self._elsewhere[device]

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, h) -> (1, total, h)."""
        if self.tokens is None:
            return x
        if self.keep is not None:  # padding is computed, too: its values must not reach a gradient
            x = torch.where(self.keep[..., None], x, 0)
        return x.reshape(-1, x.shape[-1])[self.tokens][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, total, h) -> (b, l, h), zero at padding."""
        if self.tokens is None:
            return x
        b, length = self.shape
        flat = x.new_zeros(b * length, x.shape[-1])
        out = flat.index_put((self.tokens,), x[0]).view(b, length, -1)
        return out if self.keep is None else torch.where(self.keep[..., None], out, 0)


def _by_values(keep: Tensor | None, starts: Tensor | None, continues: bool, shape: tuple[int, int]) -> Packing | None:
    """`Packing.from_batch` without the padding; shapes depend on the values of ``keep``."""
    keep_all = keep is None or bool(keep.all())
    if keep_all and (starts is None or not bool((starts if continues else starts[:, 1:]).any())):
        return None
    length = shape[1]
    if keep is None:
        assert starts is not None
        keep = torch.ones(shape, dtype=torch.bool, device=starts.device)
    device = keep.device
    tokens = keep.flatten().nonzero().squeeze(1)  # (total,)
    row = tokens // length
    total = tokens.shape[0]
    first_of_row = torch.ones(total, dtype=torch.bool, device=device)
    first_of_row[1:] = row[1:] != row[:-1]
    fresh = torch.zeros_like(first_of_row) if starts is None else starts.flatten()[tokens]
    begins = (first_of_row | fresh).nonzero().squeeze(1)  # (s,) packed positions
    cu_seqlens = torch.cat([begins, begins.new_tensor([total])]).to(torch.int32)
    owner = row[begins]
    last_of_row = torch.ones_like(owner, dtype=torch.bool)
    last_of_row[:-1] = owner[1:] != owner[:-1]
    read = torch.where(first_of_row[begins] & ~fresh[begins], owner, -1)
    write = torch.where(last_of_row, owner, -1)
    return Packing(cu_seqlens, read, write, tokens, shape, starts is None)


def _by_shape(keep: Tensor, shape: tuple[int, int]) -> Packing:
    """`Packing.from_batch` whose shapes depend on ``keep``'s shape alone.

    There are b sequences, which may be empty, and one more of the padding, which belongs to no slot.
    """
    ones = torch.ones_like(keep, dtype=torch.int64)
    tokens = torch.argsort(~keep.flatten(), stable=True)  # the real ones first, in their order
    ends = keep.sum(1).cumsum(0)
    cu_seqlens = torch.cat([torch.zeros_like(ends[:1]), ends, ones.sum()[None]]).to(torch.int32)
    rows = ones[:, 0].cumsum(0)
    rows = torch.cat([rows - 1, -rows[:1]])  # 0, ..., b - 1, and -1
    return Packing(cu_seqlens, rows, rows, tokens, shape, True, keep)


def document_starts(position_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """(b, l) bool: tokens at position 0, or whose position does not follow the previous token's.

    Where ``keep`` (b, l) is False there is padding: its positions are arbitrary, so only position 0 counts next to it.
    """
    jumps = torch.zeros_like(position_ids, dtype=torch.bool)
    jumps[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if keep is None:
        return jumps | (position_ids == 0)
    jumps[:, 1:] &= keep[:, :-1]
    return keep & (jumps | (position_ids == 0))
