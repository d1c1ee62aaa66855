"""The selective scan on NVIDIA GPUs: CUDA C++ (`kernel.cu`), compiled at run time for the shape at hand.

This file chooses the layout of a call (`forward_plan`, `backward_plan`), allocates, and launches. How the kernels work is
in `common.cuh`, `forward.cuh` and `backward.cuh`. Where CUDA C++ cannot be compiled, the Triton kernels of
`portable_gpu.py` serve, after one warning; float64 and empty inputs go to the reference.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import _nvrtc
from mambakit.ops.selective_scan import reference

_FOLDER = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STEP = 32  # chunks of a row are multiples of this many tokens


class Plan(NamedTuple):
    """How a kernel is laid out; the first four are macros of `common.cuh`."""

    lanes: int
    states: int  # of each lane
    channels: int  # of each thread
    warps: int
    min_blocks: int  # per multiprocessor that the registers must leave room for
    chunks: int
    segment: int = 0  # backward: tokens whose states are kept at once
    sub: int = 0  # backward: tokens whose states and decays are in registers
    save: int = 8  # backward: a state is kept at every so many tokens of the segment
    polynomials: int = 0  # of every 8 exponentials, on the multiply-add pipe

    @property
    def block_channels(self) -> int:
        return 32 // self.lanes * self.channels * self.warps


def _lanes(n: int) -> tuple[int, int]:
    """(lanes, states of each) that hold n states of a channel."""
    if n > 128:
        return 32, 8
    lanes = 1
    while lanes * 4 < n:
        lanes *= 2
    return lanes, 4


@functools.lru_cache(1024)
def forward_plan(b: int, length: int, d: int, n: int, multiprocessors: int) -> Plan:
    """One chunk per row when that fills the card; then as few blocks per multiprocessor as hold it, with more registers each."""
    lanes, states = _lanes(n)
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 3, 1)
    blocks = b * -(-d // plan.block_channels)
    share = -(-blocks // multiprocessors)
    if lanes in (2, 4, 8):
        plan = plan._replace(min_blocks=min(max(share, 3), 5))
    if blocks >= 1.5 * multiprocessors or length <= 256:
        return plan
    chunks = min(4 * multiprocessors // blocks + 1, length // 64)  # each launch walks one chunk fewer
    return plan._replace(chunks=max(chunks, 1), min_blocks=4 if lanes in (2, 4, 8) else 3)


# What a round of 1, 2 or 3 blocks per multiprocessor takes, relative to 2 (measured, n = 16).
_ROUND = {0: 0.0, 1: 0.72, 2: 1.0, 3: 1.42}


@functools.lru_cache(1024)
def backward_plan(b: int, length: int, d: int, n: int, multiprocessors: int) -> Plan:
    """Three blocks per multiprocessor do a little more; two keep twice the states, so that none is computed a third time."""
    lanes, states = _lanes(n)
    segment = 64 if lanes * states <= 32 else 32
    plan = Plan(lanes, states, 2 if 1 < lanes < 32 else 1, 4, 2, 1, segment, 4)
    tiles = b * -(-d // plan.block_channels)
    chunks = 1
    if tiles < 1.5 * multiprocessors and length > 256:
        chunks = max(min(6 * multiprocessors // tiles, length // 128), 1)
    if lanes not in (2, 4, 8):
        return plan._replace(chunks=chunks)

    def rounds(share):
        full, rest = divmod(tiles * chunks, share * multiprocessors)
        return full * _ROUND[share] + _ROUND[-(-rest // multiprocessors)]

    if lanes == 4 and rounds(2) <= rounds(3):
        return plan._replace(chunks=chunks, save=4)
    return plan._replace(chunks=chunks, min_blocks=3)


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def _module(
    kind: str,
    plan: Plan,
    dtype: torch.dtype,
    gated: bool,
    softplus: bool,
    packed: bool,
    whole: bool,
    device: torch.device,
):
    macros = {
        "DTYPE": _DTYPES[dtype], "LANES": plan.lanes, "NS": plan.states, "K": plan.channels, "WARPS": plan.warps,
        "HAS_Z": int(gated), "SOFTPLUS": int(softplus), "PACKED": int(packed), "WHOLE": int(whole),
        "MIN_BLOCKS": plan.min_blocks, "POLYNOMIALS": plan.polynomials,
    }  # fmt: skip
    more = {"FORWARD": 1} if kind == "forward" else {"SEGMENT": plan.segment, "SUB": plan.sub, "SAVE": plan.save}
    return _nvrtc.Module(_FOLDER, "kernel.cu", {**macros, **more}, device)


@functools.cache
def _kernels(kind: str, plan: Plan, *call):
    module = _module(kind, plan, *call)
    if kind == "forward":
        shared = _forward_shared_bytes(plan, call[0], call[1])
        return module.kernel("selective_scan_forward", shared), module.kernel("selective_scan_sequences")
    return (
        module.kernel("selective_scan_backward", _backward_shared_bytes(plan)),
        module.kernel("selective_scan_arrive"),
        module.kernel("selective_scan_finish"),
        module.kernel("selective_scan_sequences"),
    )


def _forward_shared_bytes(plan: Plan, dtype: torch.dtype, gated: bool) -> int:
    """sizeof(ForwardShared)."""
    padded, tile = plan.lanes * plan.states, 8
    width = plan.block_channels // plan.warps
    vector = 4 if width >= 16 else 2 if width >= 8 else 1
    vectors = -(-tile * width // vector // 32)
    words = -(-vector * dtype.itemsize // 4)
    inputs = 4 * (2 + gated) * plan.warps * vectors * 32 * words
    rows = 2 * (32 if padded <= 32 else 8) * 2 * padded
    padding = 2 * 2 * 2 * tile * plan.warps
    return 4 * (inputs + rows + 2 * (2 + 1) * tile * plan.block_channels + padding)


def _backward_shared_bytes(plan: Plan) -> int:
    """sizeof(BackwardShared)."""
    padded, tile = plan.lanes * plan.states, 8
    rows = plan.segment * 2 * padded
    saved = plan.segment // plan.save * plan.channels * plan.states * plan.warps * 32
    partial = 2 * plan.warps * tile * 2 * padded
    elements = tile * plan.block_channels
    padding = 2 * 2 * 2 * tile * plan.warps
    return 4 * (rows + saved + partial + (2 * (2 + 1) + 3) * elements + padding)


@functools.cache
def _fallback():
    """The Triton kernels when CUDA C++ cannot be compiled here, else None."""
    reason = _nvrtc.available()
    if reason is None:
        return None
    warnings.warn(
        f"mambakit: the selective scan runs on its slower Triton kernels: {reason}", UserWarning, stacklevel=4
    )
    from mambakit.ops.selective_scan import portable_gpu

    return portable_gpu


def _elsewhere(u: Tensor, A: Tensor):
    """The module that serves this call instead of the kernels here, or None."""
    if u.dtype == torch.float64 or u.numel() == 0 or A.shape[1] == 0:
        return reference
    fallback = _fallback()
    if fallback is None and A.shape[1] > 256:
        from mambakit.ops.selective_scan import portable_gpu

        return portable_gpu
    return fallback


def _on_its_device(function):
    """Run with the device of the first tensor current: kernels launch in the current device's context."""

    @functools.wraps(function)
    def call(first, *rest):
        if first.device.index == torch._C._cuda_getDevice():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return call


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _adjacent(t: Tensor | None) -> Tensor | None:
    """The kernels step through rows and time by stride; only the last dimension must be adjacent."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    """Contiguous, and placed where 16 bytes can be read at once."""
    if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _whole(*tensors: Tensor | None) -> bool:
    """Whether every four neighbours along the last dimension can be read at once."""
    for t in tensors:
        if t is not None:
            mask = 4 * t.element_size() - 1
            if t.data_ptr() & mask or (t.shape[-1] | t.stride(0) | t.stride(1)) & 3:
                return False
    return True


def _steps(tensors) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors] + [0 if t is None else t.stride(1) for t in tensors]


def _chunk_length(length: int, chunks: int, interval: int) -> int:
    step = max(interval, _STEP)
    return -(-length // (chunks * step)) * step


def _sequence_ids(kernel, stream, cu_seqlens, length, from_state, to_state, state_size, device):
    ids = torch.empty(length, dtype=torch.int32, device=device)
    sequences = cu_seqlens.shape[0] - 1
    rounds = min(64, -(-length // (sequences * 1024)) + 1)
    kernel(
        sequences, 256, stream, cu_seqlens.data_ptr(), ids.data_ptr(), _address(from_state), _address(to_state),
        state_size, blocks_y=rounds,
    )  # fmt: skip
    return ids


def _launch_forward(u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial, final, slots, interval):
    device = u.device
    b, length, d = u.shape
    n = A.shape[1]
    u, delta, z, B, C = map(_adjacent, (u, delta, z, B, C))
    A, D, delta_bias, slots = map(_dense, (A, D, delta_bias, slots))
    packed = cu_seqlens is not None
    plan = forward_plan(b, length, d, n, _properties(device).multi_processor_count)
    # Several chunks of a packed row would read starting states that another chunk may have overwritten.
    chunks = 1 if packed and initial is final else plan.chunks
    walk, find_sequences = _kernels(
        "forward", plan._replace(chunks=1), u.dtype, z is not None, softplus, packed, _whole(u, delta, z, B, C), device
    )
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    chunk_length = _chunk_length(length, chunks, interval)
    chunks = -(-length // chunk_length)
    y = torch.empty((b, length, d), dtype=u.dtype, device=device)
    float32 = {"dtype": torch.float32, "device": device}
    checkpoints = torch.empty((b, -(-length // interval), d, n) if interval else (0,), **float32)
    local = torch.empty(b * chunks * d * n, **float32) if chunks > 1 else None
    sums = torch.empty(b * chunks * d, **float32) if chunks > 1 else None
    ids = None
    if packed:
        cu_seqlens = cu_seqlens.contiguous()
        copied = None if initial is final else final
        ids = _sequence_ids(find_sequences, stream, cu_seqlens, length, initial, copied, d * n, device)
    tiles = -(-d // plan.block_channels)
    fields = (
        *map(_address, (u, delta, z, B, C, A, D, delta_bias, initial, slots, ids, cu_seqlens, y, final, checkpoints)),
        _address(local), _address(sums), *_steps((u, delta, z, B, C)),
        length, d, n, tiles, chunk_length, chunks,
    )  # fmt: skip
    threads = 32 * plan.warps
    if chunks == 1:
        walk(b * tiles, threads, stream, *fields, 0, interval)
    else:
        walk(b * tiles * (chunks - 1), threads, stream, *fields, 1, interval)
        walk(b * tiles * (chunks - 1), threads, stream, *fields, 2, interval)
    return y, checkpoints


@_on_its_device
def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval):
    """`mambakit::selective_scan`."""
    other = _elsewhere(u, A)
    if other is not None:
        return other.forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoint_interval
        )
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = torch.empty((sequences, u.shape[2], A.shape[1]), dtype=torch.float32, device=u.device)
    y, checkpoints = _launch_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, _dense(initial_state), final, None,
        checkpoint_interval,
    )  # fmt: skip
    return y, final, checkpoints


@_on_its_device
def forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens):
    """`mambakit::selective_scan_`."""
    other = _elsewhere(u, A)
    if other is not None:
        return other.forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    pool = _dense(state)
    assert pool is not None
    y, _ = _launch_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, pool, pool, slot_indices, 0)
    if pool is not state:
        state.copy_(pool)
    return y


@_on_its_device
def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval
):  # fmt: skip
    """`mambakit::selective_scan_backward`."""
    other = _elsewhere(u, A)
    if other is not None:
        return other.backward(
            dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints,
            interval,
        )  # fmt: skip
    device = u.device
    b, length, d = u.shape
    n = A.shape[1]
    dy, u, delta, z, B, C = map(_adjacent, (dy, u, delta, z, B, C))
    A, D, delta_bias, initial, dfinal = map(_dense, (A, D, delta_bias, initial_state, dfinal))
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else b
    plan = backward_plan(b, length, d, n, _properties(device).multi_processor_count)
    walk, arrive, finish, find_sequences = _kernels(
        "backward", plan._replace(chunks=1), u.dtype, z is not None, delta_softplus, packed,
        _whole(dy, u, delta, z, B, C), device,
    )  # fmt: skip
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    chunk_length = _chunk_length(length, plan.chunks, interval)
    chunks = -(-length // chunk_length)
    tiles = -(-d // plan.block_channels)
    padded = plan.lanes * plan.states

    float32 = {"dtype": torch.float32, "device": device}
    du, ddelta = (torch.empty((b, length, d), dtype=u.dtype, device=device) for _ in range(2))
    dz = torch.empty((b, length, d) if z is not None else (0,), dtype=u.dtype, device=device)
    dB, dC = (torch.empty((b, length, n), dtype=u.dtype, device=device) for _ in range(2))
    dinitial = torch.empty((sequences, d, n) if initial is not None else (0,), **float32)
    dA = torch.empty((d, n), **float32)
    dD, dbias = (torch.empty(d, **float32) for _ in range(2))
    partial = torch.empty(tiles * b * length * 2 * padded, **float32)
    # One row and one chunk: a single part, which is the sum.
    parts = b * chunks
    dA_parts = torch.empty(parts * d * n, **float32)
    dD_parts, dbias_parts = (torch.empty(parts * d, **float32) for _ in range(2))
    local = torch.empty(b * chunks * d * n, **float32) if chunks > 1 else None
    sums = torch.empty(b * chunks * d, **float32) if chunks > 1 else None
    ids = None
    to = dinitial if initial is not None else None
    if packed:
        cu_seqlens = cu_seqlens.contiguous()
        ids = _sequence_ids(find_sequences, stream, cu_seqlens, length, dfinal, to, d * n, device)
    inputs = (dy, u, delta, z, B, C)
    fields = (
        *map(_address, (*inputs, A, D, delta_bias, initial, dfinal, checkpoints, ids, cu_seqlens, du, ddelta, dz, to)),
        *map(_address, (local, sums, partial, dA_parts, dD_parts, dbias_parts)),
        *_steps(inputs), length, d, n, tiles, chunk_length, chunks, b * length, interval,
    )  # fmt: skip
    threads = 32 * plan.warps
    if chunks > 1:
        arrive(b * tiles * (chunks - 1), threads, stream, *fields)
    walk(b * tiles * chunks, threads, stream, *fields)
    blocks = -(-b * length * padded // 2 // 256) + -(-(d * n + 2 * d) // 256)
    finish(
        blocks, 256, stream, *map(_address, (partial, dA_parts, dD_parts, dbias_parts, dB, dC, dA, dD, dbias)),
        b * length, tiles, n, d, parts,
    )  # fmt: skip
    empty = torch.empty(0, **float32)
    return (
        du, ddelta, dA, dB, dC, empty if D is None else dD, dz, empty if delta_bias is None else dbias, dinitial,
    )  # fmt: skip
