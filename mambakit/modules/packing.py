"""Padding, restarts and documents, all as one thing: sequences packed into a single row without padding.

A batch with an attention mask, position_ids that restart, or cu_seqlens becomes one row (1, total, h) of the real
tokens and the places where sequences start. That is exact for any mask (left, right, ragged, holes), costs no work
on padding, and is what the ops understand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the tokens of a (b, l) batch lie in one packed row, and which cache row each sequence continues.

    Attributes:
        cu_seqlens: (s + 1,) int32, where sequences start in the packed row.
        read: (s,) int64, the cache row a sequence continues from; -1 starts from a zero state.
        write: (s,) int64, the cache row its final state goes to; -1 drops it.
        tokens: (total,) int64, the flat position b*l of each packed token; None when the batch is the packed row.
        shape: (b, l) of the batch.
    """

    cu_seqlens: Tensor
    read: Tensor
    write: Tensor
    tokens: Tensor | None
    shape: tuple[int, int]
    in_place: bool  # read and write are the same rows, so the in-place ops serve

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int]) -> Packing:
        """Sequences the caller packed; sequence i belongs to cache row i."""
        rows = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        return Packing(cu_seqlens, rows, rows, None, shape, True)

    @staticmethod
    def from_batch(
        keep: Tensor | None, starts: Tensor | None, continues: bool, shape: tuple[int, int]
    ) -> Packing | None:
        """Pack a batch.

        Args:
            keep: (b, l) bool, the real tokens; all when None.
            starts: (b, l) bool, tokens that begin a new document; none when None.
            continues: a filled cache precedes the batch, so that a row's first token need not begin a document.

        Returns:
            None where nothing has to be packed: every token is real and no document begins inside a row.
        """
        keep_all = keep is None or bool(keep.all())
        if keep_all and (starts is None or not bool((starts if continues else starts[:, 1:]).any())):
            return None
        length = shape[1]
        given = keep if keep is not None else starts
        assert given is not None
        device = given.device
        if keep is None:
            keep = torch.ones(shape, dtype=torch.bool, device=device)
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

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, h) -> (1, total, h)."""
        return x if self.tokens is None else x.reshape(-1, x.shape[-1])[self.tokens][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, total, h) -> (b, l, h), zero where there was no token."""
        if self.tokens is None:
            return x
        b, length = self.shape
        flat = x.new_zeros(b * length, x.shape[-1])
        return flat.index_put((self.tokens,), x[0]).view(b, length, -1)


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
