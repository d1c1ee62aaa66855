"""What lies between the models' steps in a round of speculation, on small tensors of integers, in PyTorch.

On a GPU each function is one kernel instead (`mambakit.ops.decode.triton_round`), since a round has dozens of these ops
and each would take as long as a launch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

# Columns of a row of what is known of each text, before those of its end tokens. PREVIOUS is the token before the last
# one, which the draft model reads first where LATE is 1. POSITION: the number of tokens chosen so far. MOST: where the
# text ends.
LAST, PREVIOUS, LATE, POSITION, MOST, ENDED, FIELDS = range(7)
# Columns of a round's result, before those of the tokens: how many of them the text gets, the guesses and those that
# were accepted, and whether the draft model had no distribution to draw a guess from.
READ, GUESSED, ACCEPTED, BROKEN, TOKENS = range(5)


def steps_for(device: torch.device) -> Any:
    """This module, or Triton's kernels for what it does."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from mambakit.ops.decode import triton_round

        return triton_round
    import mambakit.decoding.round_steps as reference

    return reference


def begin(rows: Tensor, asked: Tensor, inputs: Tensor, counts: Tensor) -> None:
    """Write the first token that the draft model reads, ``inputs`` (b,), and the number of guesses, ``counts`` (b,).

    Args:
        rows: (b, FIELDS + ends) int64.
        asked: (b, 3) int64: the maximum number of guesses, the draft model's steps, and whether the text is written.
    """
    last, previous, late, position, most, _ = rows[:, :FIELDS].unbind(1)
    limit, steps, _ = asked.unbind(1)
    inputs.copy_(torch.where(late > 0, previous, last))
    counts.copy_(torch.minimum(torch.minimum(limit, steps - late), most - position - 1).clamp(min=0))


def second(rows: Tensor, picked: Tensor, inputs: Tensor) -> None:
    """Write the second token that the draft model reads: a late text's last one, or what was ``picked`` (b,)."""
    inputs.copy_(torch.where(rows[:, LATE] > 0, rows[:, LAST], picked))


def assemble(rows: Tensor, picks: Tensor, tokens: Tensor) -> None:
    """Write the tokens to verify (b, k + 1): the last one, and the guesses among ``picks`` (s, b), one of each step."""
    tokens[:, 0] = rows[:, LAST]
    if (k := tokens.shape[1] - 1) > 0:
        at = torch.arange(k, dtype=torch.int64, device=rows.device) + rows[:, LATE, None]
        tokens[:, 1:] = picks.t().gather(1, at.clamp(max=len(picks) - 1))


def accept(guesses: Tensor, best: Tensor, counts: Tensor, accepted: Tensor) -> None:
    """Write how many of a greedy text's guesses are right: ``accepted`` (b,).

    Args:
        guesses: (b, k + 1), the verified tokens: the guesses from column 1 on.
        best: (b, k + 1), the most probable token after each.
        counts: (b,), how many are guesses.
    """
    k = guesses.shape[1] - 1
    places = torch.arange(k, dtype=torch.int64, device=best.device)
    right = (guesses[:, 1:] == best[:, :k]) & (places < counts[:, None])
    accepted.copy_(right.long().cumprod(1).sum(1))


def finish(
    rows: Tensor, asked: Tensor, tokens: Tensor, accepted: Tensor, counts: Tensor, broken: Tensor, steps: int,
    found: Tensor, kept: Tensor, snapshots: Tensor,
) -> None:  # fmt: skip
    """Write a round's result, and what it makes of the texts.

    Args:
        rows, asked: as in `begin`; ``rows`` is updated.
        tokens: (b, k + 1), the accepted guesses and one more.
        accepted, counts, broken: (b,).
        steps: of the draft model in this round; 0: it was not stepped.
        found: (b, >= TOKENS + k + 1), the result.
        kept: (b,), how many of the verified tokens the text's state reads.
        snapshots: (b,), the row of the draft model's snapshots from which it continues.
    """
    last, previous, late, position, most, ended = rows[:, :FIELDS].unbind(1)
    b, width = tokens.shape
    places = torch.arange(width, dtype=torch.int64, device=tokens.device)
    going = (asked[:, 2] > 0) & (ended == 0)
    is_end = (tokens < 0) | (tokens[:, :, None] == rows[:, None, FIELDS:]).any(-1)
    is_end |= position[:, None] + places + 1 >= most[:, None]
    is_end &= places <= accepted[:, None]
    before = (is_end.long().cumsum(1) == 0).long().sum(1)  # the first end
    read = torch.where(going, torch.minimum(before, accepted) + 1, 0)
    kept.copy_(read)
    found[:, READ], found[:, GUESSED], found[:, ACCEPTED], found[:, BROKEN] = read, counts, accepted, broken
    found[:, TOKENS : TOKENS + width] = tokens
    if steps:
        need = late + 1 + accepted  # steps after which the draft model has read all but the new token
        behind = (need > asked[:, 1]).long()
        at = torch.arange(b, dtype=torch.int64, device=tokens.device)
        snapshots.copy_(((need - behind).clamp(1, steps) - 1) * b + at)
        before_last = tokens.gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]
        late.copy_(torch.where(going, behind, late))
        previous.copy_(torch.where(going, before_last.clamp(min=0), previous))
    newest = tokens.gather(1, (read - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
    last.copy_(torch.where(going, newest, last))
    position.add_(read)
    ended.add_(going & (before <= accepted))
