"""The layout of the CUDA C++ scan for a shape: its macros, its shared memory, and which layout is fastest.

Measured choices; `benchmarks/gpu_ops.py --sweep` measures them again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

_TILE = 8  # tokens, as in common.cuh
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Macros = tuple[tuple[str, int], ...]


class Variant(NamedTuple):
    """Operands other than channels-last rows with one B and C; the macros of common.cuh explain each."""

    grouped: bool = False
    constant: int = 0
    transposed: int = 0


PLAIN = Variant()
EVEN_ROWS = 16
"""The bit of `Variant.transposed` that says where rows begin."""


class Plan(NamedTuple):
    """The layout of a kernel: what it is compiled with, and how many CTAs share a row."""

    lanes: int  # that share a channel
    states: int  # of each lane
    channels: int  # of each thread
    warps: int  # of a CTA
    min_ctas: int  # per SM that the registers must leave room for
    chunks: int  # of a row
    round: int = 32  # forward: tokens double-buffered in shared memory, if of 2 bytes (half as many of 4)
    segment: int = 0  # backward: tokens whose states are saved at once
    sub: int = 0  # backward: tokens whose states and decays are in registers
    save: int = 8  # backward: tokens from one saved state of a segment to the next
    resident: int = 0  # resident CTAs per SM in chained mode (`common.cuh`); 0 = off

    @property
    def cta_channels(self) -> int:
        return 32 // self.lanes * self.channels * self.warps

    def round_tokens(self, itemsize: int) -> int:
        """Tokens of a round of the forward kernel."""
        return _TILE if self.lanes * self.states > 32 else max(_TILE, self.round * 2 // itemsize)

    def forward_bytes(self, itemsize: int, gated: bool, transposed: int = 0) -> int:
        """Bytes of shared memory of the forward kernel, which compares them with sizeof(ForwardShared)."""
        tokens = self.round_tokens(itemsize)
        pitch = tokens + 16 // itemsize if transposed & 7 else tokens
        inputs = 2 * (2 + gated) * pitch * self.cta_channels * itemsize
        rows = 2 * tokens * 2 * self.lanes * self.states
        steps = 2 * tokens * (self.cta_channels + 2 * self.warps)
        partials = self.lanes if self.lanes <= 4 else 1
        along = (7 if gated else 3) | EVEN_ROWS
        padding = 4 if transposed & along == along else 16 * (partials > 1)
        outputs = _TILE * (partials * self.cta_channels + padding * self.warps)
        return inputs + 4 * (rows + steps + outputs)

    def chained_bytes(self, shared: int) -> int:
        """What a CTA of a chained scan allocates, so that no more than ``resident`` CTAs share an SM."""
        return ((shared + 1024) // (self.resident + 1) - 1024) // 128 * 128 + 128

    @property
    def backward_bytes(self) -> int:
        """Bytes of shared memory of the gradient's kernel, which compares them with sizeof(BackwardShared)."""
        padded = self.lanes * self.states
        rows = self.segment * 2 * padded
        saved = self.segment // self.save * self.channels * self.states * self.warps * 32
        partial = 2 * self.warps * _TILE * 2 * padded
        elements = _TILE * self.cta_channels
        padding = 2 * 2 * 2 * _TILE * self.warps
        exchanged = self.warps * (2 * 2 * 32 * self.states if self.lanes < 32 else 4)
        return 4 * (rows + saved + partial + exchanged + (2 * (2 + 1) + 3) * elements + padding)

    def forward_macros(
        self, dtype: torch.dtype, gated: bool, softplus: bool, packed: bool, aligned: int, variant: Variant = PLAIN
    ) -> Macros:
        """What `kernel.cu` is compiled with for the forward kernel.

        ``aligned``: elements that one load may read, or 0.
        """
        itemsize = dtype.itemsize
        shared = self.forward_bytes(itemsize, gated, variant.transposed)
        macros = {"FORWARD": 1, "ROUND": self.round_tokens(itemsize), "SHARED": shared}
        return self._macros(macros, dtype, gated, softplus, packed, aligned, variant)

    def backward_macros(
        self, dtype: torch.dtype, gated: bool, softplus: bool, packed: bool, aligned: int, variant: Variant = PLAIN
    ) -> Macros:
        """The same for the gradient's kernels."""
        macros = {"SEGMENT": self.segment, "SUB": self.sub, "SAVE": self.save, "SHARED": self.backward_bytes}
        return self._macros(macros, dtype, gated, softplus, packed, aligned, variant)

    def _macros(
        self, macros: dict[str, int], dtype: torch.dtype, gated: bool, softplus: bool, packed: bool, aligned: int,
        variant: Variant,
    ) -> Macros:  # fmt: skip
        macros |= {
            "DTYPE": _DTYPES[dtype], "LANES": self.lanes, "NS": self.states, "K": self.channels, "WARPS": self.warps,
            "HAS_Z": int(gated), "SOFTPLUS": int(softplus), "PACKED": int(packed), "ALIGNED": aligned,
            "MIN_CTAS": self.min_ctas, "CHAINED": int(self.resident > 0),
            "GROUPED": int(variant.grouped), "CONSTANT": variant.constant, "TRANSPOSED": variant.transposed,
        }  # fmt: skip
        return tuple(macros.items())


def _lanes(n: int) -> tuple[int, int]:
    """(lanes, states of each) that hold n states of a channel."""
    if n > 128:
        return 32, 8
    lanes = 1
    while lanes * 4 < n:
        lanes *= 2
    return lanes, 4


class _Layout(NamedTuple):
    """A forward layout for 9 to 16 states and its cost model, fitted to an H100's times.

    A CTA takes max(alone, fixed + each * (CTAs of the busiest SM)) nanoseconds per token.
    """

    plan: Plan
    alone: float
    whole: tuple[float, float]  # (fixed, each) of whole rows
    cut: tuple[float, float]  # of chunks, over both launches: aggregates, then the scan
    together: tuple[int, ...]  # chunks are tried for so many CTAs per SM
    shortest: int  # tokens of a chunk


# A thread with all 16 states needs no shuffles; with 8, few CTAs do more. With 16, chunks are also tried for two waves
# of CTAs, as the second fills the tail of the first. Of (b, d, l) inputs its warps read twice as many rows at once: 4 x
# 1536 x 2048 took 0.213 ms with 16 and 0.158 with 8 (H200, bfloat16).
_LAYOUTS = (
    _Layout(Plan(2, 8, 1, 2, 8, 1, round=16), 86.0, (16.0, 24.9), (13.6, 22.6), (4, 8), 64),
    _Layout(Plan(1, 16, 1, 2, 6, 1, round=16), 190.0, (8.0, 49.2), (13.6, 44.4), (4, 12), 128),
)
_SCHEDULERS = 4  # of an SM
_LAUNCH = 5000.0  # nanoseconds
_START = 16  # cost of a chunk's start, in tokens
_CARRY = 1000.0  # nanoseconds of a chunk in a chained scan beside its tokens; forward
_CARRY_TOKENS = 4  # the same backward, in tokens
_CHAINED_GAIN = 0.96  # a chained scan is chosen below this fraction of the other plan's time


@functools.lru_cache(1024)
def forward_plan(
    b: int, length: int, d: int, n: int, multiprocessors: int, chained: bool = True, transposed: bool = False
) -> Plan:
    """The layout and the number of chunks that take the least time.

    Rows are cut when whole ones leave the card idle. Where they fill it unevenly, a chained scan is considered if
    ``chained``. ``transposed``: an input is (b, d, l) in memory.
    """
    if 8 < n <= 16:
        shape = b, length, d, multiprocessors
        layouts = _LAYOUTS[:1] if transposed else _LAYOUTS
        best = min((t for layout in layouts for t in _timed(*shape, layout)), key=lambda t: t[0])
        offered = (t for layout in layouts for t in _timed_chained(*shape, layout)) if chained else ()
        chain = min(offered, key=lambda t: t[0], default=best)
        return chain[1] if chain[0] < _CHAINED_GAIN * best[0] else _fitted(best[1], d)
    lanes, states = _lanes(n)
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 4 if lanes in (2, 4, 8) else 3, 1)
    ctas = b * -(-d // plan.cta_channels)
    if ctas >= 1.5 * multiprocessors or length <= 256:
        return plan
    return plan._replace(chunks=_chunks(length, ctas, 4 * multiprocessors))


def _fitted(plan: Plan, d: int) -> Plan:
    """The plan with fewer warps in a CTA, and as many more CTAs, where more than a sixth of the warps would have no
    channels: 48 channels of a group are three warps of 16, and two CTAs of two warps."""

    def padded(warps: int) -> int:
        channels = plan.cta_channels // plan.warps * warps
        return -(-d // channels) * channels

    warps = min(range(plan.warps, 0, -1), key=padded)
    # A chained scan has as many CTAs as were counted on.
    if plan.resident or 6 * padded(warps) > 5 * padded(plan.warps):
        return plan
    return plan._replace(warps=warps, min_ctas=plan.min_ctas * plan.warps // warps)


def _chunks(length: int, ctas: int, together: int, shortest: int = 64) -> int:
    """Chunks of a row for ``together`` CTAs per launch; each of the two launches scans all chunks but one."""
    return max(min(together // ctas + 1, length // shortest), 1)


def _timed(b: int, length: int, d: int, multiprocessors: int, layout: _Layout) -> Iterator[tuple[float, Plan]]:
    """(predicted nanoseconds, plan)"""
    plan = layout.plan
    ctas = b * -(-d // plan.cta_channels)
    beside = _SCHEDULERS // plan.warps
    wanted = {_chunks(length, ctas, share * multiprocessors, layout.shortest) for share in layout.together}
    for chunks in sorted({1, *wanted} if length > 256 else {1}):
        # CTAs of the busiest SM, rounded up to one warp per scheduler.
        share = -(-ctas * max(chunks - 1, 1) // (multiprocessors * beside)) * beside
        whole, cut = (max(layout.alone, fixed + each * share) for fixed, each in (layout.whole, layout.cut))
        if chunks == 1:
            time = _LAUNCH + whole * length
        else:  # the first chunk needs no aggregate
            time = 2 * (_LAUNCH + (cut + (whole - cut) / (chunks - 1)) * (length / chunks + _START))
        yield time, _with_registers(plan, share)._replace(chunks=chunks)


def _with_registers(plan: Plan, resident: int) -> Plan:
    """Fewer resident CTAs leave more registers to each: a gain for threads of 8 states, a loss for those of 16."""
    return plan._replace(min_ctas=max(min(resident, plan.min_ctas), 4)) if plan.lanes == 2 else plan


def _waves(chains: int, length: int, ctas: int) -> Iterator[tuple[int, int, int]]:
    """(chunks of a row, tokens of a chunk, waves of ``ctas`` CTAs) of the chained scans to choose from."""
    for wanted in range(2, min(32, length // 128) + 1):
        chunk = -(-length // (wanted * 64)) * 64
        chunks = -(-length // chunk)
        yield chunks, chunk, -(-chains * chunks // ctas)


def _timed_chained(b: int, length: int, d: int, multiprocessors: int, layout: _Layout) -> Iterator[tuple[float, Plan]]:
    """(predicted nanoseconds, plan)"""
    plan, (fixed, each) = layout.plan, layout.whole
    chains = b * -(-d // plan.cta_channels)
    beside = _SCHEDULERS // plan.warps
    for resident in range(beside, plan.min_ctas, beside):
        ctas = resident * multiprocessors
        if chains > ctas:  # else one CTA per chain is as good
            token = max(layout.alone, fixed + each * resident)
            for chunks, chunk, waves in _waves(chains, length, ctas):
                time = 2 * _LAUNCH + waves * (_CARRY + token * chunk)
                # Measured at 4 x 5120 x 4096: 0.584 ms, 0.581 with more registers, 0.576 with longer rounds too; chunks
                # of 256 gain nothing.
                longer = 32 if plan.lanes == 2 and chunk >= 1024 else plan.round
                chain = _with_registers(plan, resident + 2)._replace(round=longer)
                yield time, chain._replace(chunks=chunks, resident=resident)


# Time of a wave of 1, 2 or 3 CTAs per SM, relative to 2 (measured, n = 16).
_WAVE = {0: 0.0, 1: 0.72, 2: 1.0, 3: 1.48}


@functools.lru_cache(1024)
def backward_plan(b: int, length: int, d: int, n: int, multiprocessors: int, shared: int, chained: bool = True) -> Plan:
    """The gradient's layout for CTAs of at most ``shared`` bytes of shared memory.

    Three CTAs per SM do a little more work. Two save twice the states, so that none is computed a third time, and may
    be a chained scan, if ``chained``, where rows fill the card unevenly.
    """
    lanes, states = _lanes(n)
    segment = 64 if lanes * states <= 32 else 32
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 2, 1, segment=segment, sub=4)
    tiles = b * -(-d // plan.cta_channels)
    chunks = 1
    if tiles < 1.5 * multiprocessors and length > 256:
        chunks = max(min(9 * multiprocessors // tiles, length // 128), 1)
    if lanes not in (2, 4, 8):
        return plan._replace(chunks=chunks)

    def waves(share):
        full, rest = divmod(tiles * chunks, share * multiprocessors)
        return full * _WAVE[share] + _WAVE[-(-rest // multiprocessors)]

    twice = plan._replace(chunks=chunks, save=4)
    if lanes == 4 and twice.backward_bytes <= shared:
        if chained and chunks == 1 and tiles > 2 * multiprocessors:
            offered = (
                (wave * (chunk + _CARRY_TOKENS) / length, c)
                for c, chunk, wave in _waves(tiles, length, 2 * multiprocessors)
            )
            time, cut = min(offered, default=(math.inf, 1))
            if time * _WAVE[2] < _CHAINED_GAIN * min(waves(2), waves(3)):
                return twice._replace(chunks=cut, resident=2)
        if waves(2) <= waves(3):
            return _fitted(twice, d)
    plan = _fitted(plan._replace(chunks=chunks, min_ctas=3), d)
    # An SM has 1 KB more than a CTA may allocate, and reserves 1 KB for each CTA.
    together = (shared + 1024) // (plan.backward_bytes + 1024)
    return plan._replace(min_ctas=max(1, min(plan.min_ctas, together)))
