"""`mambakit.decoding.round_steps`, which says what each function does, in Triton: one launch each, a program a row.

Columns are numbered as there; a test compares them. A row's tokens are read one after the other: they are few.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LAST, PREVIOUS, LATE, POSITION, MOST, ENDED, FIELDS = (tl.constexpr(i) for i in range(7))
READ, GUESSED, ACCEPTED, BROKEN, TOKENS = (tl.constexpr(i) for i in range(5))


@triton.jit
def _begin(rows, asked, inputs, counts, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    at = rows + row * COLUMNS
    late = tl.load(at + LATE)
    token = tl.load(at + LAST)
    if late > 0:
        token = tl.load(at + PREVIOUS)
    tl.store(inputs + row, token)
    limit = tl.minimum(tl.load(asked + row * 3), tl.load(asked + row * 3 + 1) - late)
    limit = tl.minimum(limit, tl.load(at + MOST) - tl.load(at + POSITION) - 1)
    tl.store(counts + row, tl.maximum(limit, 0))


@triton.jit
def _second(rows, picked, inputs, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    token = tl.load(picked + row)
    if tl.load(rows + row * COLUMNS + LATE) > 0:
        token = tl.load(rows + row * COLUMNS + LAST)
    tl.store(inputs + row, token)


@triton.jit
def _assemble(rows, picks, tokens, COLUMNS: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    late = tl.load(rows + row * COLUMNS + LATE)
    tl.store(tokens + row * WIDTH, tl.load(rows + row * COLUMNS + LAST))
    for j in tl.range(WIDTH - 1):
        tl.store(tokens + row * WIDTH + 1 + j, tl.load(picks + tl.minimum(late + j, STEPS - 1) * B + row))


@triton.jit
def _accept(guesses, best, counts, accepted, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    count = tl.load(counts + row)
    right = tl.full((), 0, tl.int64)
    for j in tl.range(WIDTH - 1):
        same = tl.load(guesses + row * WIDTH + 1 + j) == tl.load(best + row * WIDTH + j)
        right += ((right == j) & same & (j < count)).to(tl.int64)
    tl.store(accepted + row, right)


@triton.jit
def _finish(
    rows, asked, tokens, accepted, counts, broken, found, kept, snapshots,
    COLUMNS: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, FOUND: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at, result, mine = rows + row * COLUMNS, found + row * FOUND, tokens + row * WIDTH
    late, position, most = tl.load(at + LATE), tl.load(at + POSITION), tl.load(at + MOST)
    right, going = tl.load(accepted + row), (tl.load(asked + row * 3 + 2) > 0) & (tl.load(at + ENDED) == 0)
    before = tl.full((), WIDTH, tl.int64)  # the first end
    for j in tl.range(WIDTH):
        token = tl.load(mine + j)
        tl.store(result + TOKENS + j, token)
        is_end = (token < 0) | (position + j + 1 >= most)
        for e in tl.range(FIELDS, COLUMNS):
            is_end = is_end | (token == tl.load(at + e))
        before = tl.where(is_end & (j <= right) & (before == WIDTH), j, before)
    read = tl.where(going, tl.minimum(before, right) + 1, 0)
    tl.store(kept + row, read)
    tl.store(result + READ, read)
    tl.store(result + GUESSED, tl.load(counts + row))
    tl.store(result + ACCEPTED, right)
    tl.store(result + BROKEN, tl.load(broken + row))
    if STEPS > 0:
        need = late + 1 + right
        behind = (need > tl.load(asked + row * 3 + 1)).to(tl.int64)
        step = tl.minimum(tl.maximum(need - behind, 1), STEPS)
        tl.store(snapshots + row, (step - 1) * B + row)
        if going:
            tl.store(at + LATE, behind)
            tl.store(at + PREVIOUS, tl.maximum(tl.load(mine + tl.maximum(right - 1, 0)), 0))
    if going:
        tl.store(at + LAST, tl.maximum(tl.load(mine + read - 1), 0))
        tl.store(at + POSITION, position + read)
        tl.store(at + ENDED, (before <= right).to(tl.int64))


def begin(rows: Tensor, asked: Tensor, inputs: Tensor, counts: Tensor) -> None:
    _begin[(len(rows),)](rows, asked, inputs, counts, rows.shape[1], num_warps=1)


def second(rows: Tensor, picked: Tensor, inputs: Tensor) -> None:
    _second[(len(rows),)](rows, picked, inputs, rows.shape[1], num_warps=1)


def assemble(rows: Tensor, picks: Tensor, tokens: Tensor) -> None:
    _assemble[(len(rows),)](rows, picks, tokens, rows.shape[1], len(rows), len(picks), tokens.shape[1], num_warps=1)


def accept(guesses: Tensor, best: Tensor, counts: Tensor, accepted: Tensor) -> None:
    _accept[(len(best),)](guesses, best, counts, accepted, best.shape[1], num_warps=1)


def finish(
    rows: Tensor, asked: Tensor, tokens: Tensor, accepted: Tensor, counts: Tensor, broken: Tensor, steps: int,
    found: Tensor, kept: Tensor, snapshots: Tensor,
) -> None:  # fmt: skip
    b, width = tokens.shape
    _finish[(b,)](
        rows, asked, tokens, accepted, counts, broken, found, kept, snapshots,
        rows.shape[1], b, width, found.shape[1], steps, num_warps=1,
    )  # fmt: skip
