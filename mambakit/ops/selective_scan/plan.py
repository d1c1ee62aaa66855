"""How the CUDA C++ scan is laid out for a shape: lanes and states of a channel, chunks of a row, what is kept for the gradient.

Measured choices; docs/kernels.md has what was tried, `benchmarks/gpu_ops.py --sweep` tries it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

_TILE = 8  # tokens, as in common.cuh


class Plan(NamedTuple):
    """How a kernel is laid out; the first four are macros of `common.cuh`."""

    lanes: int
    states: int  # of each lane
    channels: int  # of each thread
    warps: int
    min_blocks: int  # per multiprocessor that the registers must leave room for
    chunks: int
    round: int = 32  # forward: tokens whose inputs are in shared memory at once, of 2 bytes each (half as many of 4)
    segment: int = 0  # backward: tokens whose states are kept at once
    sub: int = 0  # backward: tokens whose states and decays are in registers
    save: int = 8  # backward: a state is kept at every so many tokens of the segment
    resident: int = 0  # of a multiprocessor's blocks, between which rows are handed on (RELAY in `common.cuh`); 0: each walks its own

    @property
    def block_channels(self) -> int:
        return 32 // self.lanes * self.channels * self.warps

    def tokens(self, itemsize: int) -> int:
        """Of a round of the forward kernel."""
        return _TILE if self.lanes * self.states > 32 else max(_TILE, self.round * 2 // itemsize)

    def forward_bytes(self, itemsize: int, gated: bool) -> int:
        """sizeof(ForwardShared)."""
        tokens = self.tokens(itemsize)
        inputs = 2 * (2 + gated) * tokens * self.block_channels * itemsize
        rows = 2 * tokens * 2 * self.lanes * self.states
        steps = 2 * tokens * (self.block_channels + 2 * self.warps)
        shares = self.lanes if self.lanes <= 4 else 1
        outputs = _TILE * (shares * self.block_channels + 16 * self.warps * (shares > 1))
        return inputs + 4 * (rows + steps + outputs)

    def relay_bytes(self, shared: int) -> int:
        """What a block of a relay must ask for, so that no more than ``resident`` of them share a multiprocessor."""
        return ((shared + 1024) // (self.resident + 1) - 1024) // 128 * 128 + 128

    @property
    def backward_bytes(self) -> int:
        """sizeof(BackwardShared)."""
        padded = self.lanes * self.states
        rows = self.segment * 2 * padded
        saved = self.segment // self.save * self.channels * self.states * self.warps * 32
        partial = 2 * self.warps * _TILE * 2 * padded
        elements = _TILE * self.block_channels
        padding = 2 * 2 * 2 * _TILE * self.warps
        exchanged = self.warps * (2 * 2 * 32 * self.states if self.lanes < 32 else 4)
        return 4 * (rows + saved + partial + exchanged + (2 * (2 + 1) + 3) * elements + padding)


def _lanes(n: int) -> tuple[int, int]:
    """(lanes, states of each) that hold n states of a channel."""
    if n > 128:
        return 32, 8
    lanes = 1
    while lanes * 4 < n:
        lanes *= 2
    return lanes, 4


class _Layout(NamedTuple):
    """A forward layout for 9 to 16 states and the nanoseconds that a token takes a block: `alone` or fixed + each * (blocks of the busiest
    multiprocessor), whichever is more; fitted to an H100's times (docs/kernels.md has how well)."""

    plan: Plan
    alone: float
    whole: tuple[float, float]  # fixed, each; of whole rows
    cut: tuple[float, float]  # of chunks, which are walked for their sums and then for good
    together: tuple[int, ...]  # chunks are tried for so many blocks of a multiprocessor
    shortest: int  # tokens of a chunk


# A thread with all 16 states exchanges nothing; with 8, few blocks do more. Of chunks with 16 in two waves, the second one fills in where
# the first ends.
_LAYOUTS = (
    _Layout(Plan(2, 8, 1, 2, 8, 1, round=16), 86.0, (16.0, 24.9), (13.6, 22.6), (4, 8), 64),
    _Layout(Plan(1, 16, 1, 2, 6, 1, round=16), 190.0, (8.0, 49.2), (13.6, 44.4), (4, 12), 128),
)
_SCHEDULERS = 4  # of a multiprocessor
_LAUNCH = 5000.0  # nanoseconds
_START = 16  # tokens that a chunk's start is worth
_TURN = 1000.0  # nanoseconds that a block of a relay takes beside its tokens; forward
_TURN_TOKENS = 4  # backward, in tokens
_RELAY_GAINS = 0.96  # a relay is chosen below this share of the other plan's time


@functools.lru_cache(1024)
def forward_plan(b: int, length: int, d: int, n: int, multiprocessors: int, relays: bool = True) -> Plan:
    """The layout and the number of chunks that take the least time: rows are cut when whole ones leave the card idle, and handed on
    between blocks where they fill it unevenly, if ``relays`` are possible."""
    if 8 < n <= 16:
        shape = b, length, d, multiprocessors
        best = min((t for layout in _LAYOUTS for t in _timed(*shape, layout)), key=lambda t: t[0])
        offered = (t for layout in _LAYOUTS for t in _timed_relays(*shape, layout)) if relays else ()
        relay = min(offered, key=lambda t: t[0], default=best)
        return relay[1] if relay[0] < _RELAY_GAINS * best[0] else best[1]
    lanes, states = _lanes(n)
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 4 if lanes in (2, 4, 8) else 3, 1)
    blocks = b * -(-d // plan.block_channels)
    if blocks >= 1.5 * multiprocessors or length <= 256:
        return plan
    return plan._replace(chunks=_chunks(length, blocks, 4 * multiprocessors))


def _chunks(length: int, blocks: int, together: int, shortest: int = 64) -> int:
    """Chunks of a row for ``together`` blocks of a launch; each of the two launches walks one chunk fewer."""
    return max(min(together // blocks + 1, length // shortest), 1)


def _timed(b: int, length: int, d: int, multiprocessors: int, layout: _Layout) -> Iterator[tuple[float, Plan]]:
    """(predicted nanoseconds, plan)"""
    plan = layout.plan
    blocks = b * -(-d // plan.block_channels)
    beside = _SCHEDULERS // plan.warps
    wanted = {_chunks(length, blocks, share * multiprocessors, layout.shortest) for share in layout.together}
    for chunks in sorted({1, *wanted} if length > 256 else {1}):
        # The busiest multiprocessor's blocks, in so many as give each scheduler a warp.
        share = -(-blocks * max(chunks - 1, 1) // (multiprocessors * beside)) * beside
        whole, cut = (max(layout.alone, fixed + each * share) for fixed, each in (layout.whole, layout.cut))
        if chunks == 1:
            time = _LAUNCH + whole * length
        else:  # the first chunk is walked for good at once
            time = 2 * (_LAUNCH + (cut + (whole - cut) / (chunks - 1)) * (length / chunks + _START))
        yield time, _with_registers(plan, share)._replace(chunks=chunks)


def _with_registers(plan: Plan, resident: int) -> Plan:
    """What threads of 8 states gain by the registers of blocks that are not there; those of 16 lose by more than they need."""
    return plan._replace(min_blocks=max(min(resident, plan.min_blocks), 4)) if plan.lanes == 2 else plan


def _turns(relays: int, length: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(chunks of a row, tokens of each, how many of them ``blocks`` at a time walk one after the other), for what a relay may choose."""
    for wanted in range(2, min(32, length // 128) + 1):
        chunk = -(-length // (wanted * 64)) * 64
        chunks = -(-length // chunk)
        yield chunks, chunk, -(-relays * chunks // blocks)


def _timed_relays(b: int, length: int, d: int, multiprocessors: int, layout: _Layout) -> Iterator[tuple[float, Plan]]:
    """(predicted nanoseconds, plan)"""
    plan, (fixed, each) = layout.plan, layout.whole
    relays = b * -(-d // plan.block_channels)
    beside = _SCHEDULERS // plan.warps
    for resident in range(beside, plan.min_blocks, beside):
        blocks = resident * multiprocessors
        if relays > blocks:  # else each may as well walk its own
            token = max(layout.alone, fixed + each * resident)
            for chunks, chunk, turns in _turns(relays, length, blocks):
                time = 2 * _LAUNCH + turns * (_TURN + token * chunk)
                # Measured: 0.581 ms for 0.584 by the registers, 0.576 by the longer rounds (4 x 5120 x 4096), no gain for chunks of 256.
                longer = 32 if plan.lanes == 2 and chunk >= 1024 else plan.round
                relay = _with_registers(plan, resident + 2)._replace(round=longer)
                yield time, relay._replace(chunks=chunks, resident=resident)


# What a round of 1, 2 or 3 blocks per multiprocessor takes, relative to 2 (measured, n = 16).
_ROUND = {0: 0.0, 1: 0.72, 2: 1.0, 3: 1.48}


@functools.lru_cache(1024)
def backward_plan(b: int, length: int, d: int, n: int, multiprocessors: int, shared: int, relays: bool = True) -> Plan:
    """Three blocks per multiprocessor do a little more; two keep twice the states, so that none is computed a third time, where a
    block's ``shared`` bytes suffice, and rows that fill the card unevenly are handed on between those, if ``relays`` are possible."""
    lanes, states = _lanes(n)
    segment = 64 if lanes * states <= 32 else 32
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 2, 1, segment=segment, sub=4)
    tiles = b * -(-d // plan.block_channels)
    chunks = 1
    if tiles < 1.5 * multiprocessors and length > 256:
        chunks = max(min(9 * multiprocessors // tiles, length // 128), 1)
    if lanes not in (2, 4, 8):
        return plan._replace(chunks=chunks)

    def rounds(share):
        full, rest = divmod(tiles * chunks, share * multiprocessors)
        return full * _ROUND[share] + _ROUND[-(-rest // multiprocessors)]

    twice = plan._replace(chunks=chunks, save=4)
    if lanes == 4 and twice.backward_bytes <= shared:
        if relays and chunks == 1 and tiles > 2 * multiprocessors:
            turns = (
                (turn * (chunk + _TURN_TOKENS) / length, c)
                for c, chunk, turn in _turns(tiles, length, 2 * multiprocessors)
            )
            time, relayed = min(turns, default=(math.inf, 1))
            if time * _ROUND[2] < _RELAY_GAINS * min(rounds(2), rounds(3)):
                return twice._replace(chunks=relayed, resident=2)
        if rounds(2) <= rounds(3):
            return twice
    # A multiprocessor has what a block may have and 1 KB, and keeps 1 KB of each block's to itself.
    together = (shared + 1024) // (plan.backward_bytes + 1024)
    return plan._replace(chunks=chunks, min_blocks=max(1, min(3, together)))
