"""The selective scan on NVIDIA GPUs: CUDA C++ (`kernel.cu`), compiled at run time for the shape at hand.

This file allocates and launches; the layout of a call is `plan.py`'s choice. How the kernels work is in `common.cuh`, `forward.cuh` and
`backward.cuh`. Where CUDA C++ cannot be compiled, the Triton kernels of `triton.py` serve, after one warning; one token in place goes
there, too. float64 and empty inputs go to plain PyTorch (`chunked.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops._backends import memory, nvrtc
from mambakit.ops._backends.memory import FLOAT32, INT32
from mambakit.ops.selective_scan import chunked
from mambakit.ops.selective_scan.plan import Plan, backward_plan, forward_plan

_FOLDER = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STEP = 32  # chunks of a row are multiples of this many tokens
_FARTHEST = 2**26  # elements from one token to the next: within a tile the gradient's offsets are 32 bits of bytes


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _macros(
    kind: str, plan: Plan, dtype: torch.dtype, gated: bool, softplus: bool, packed: bool, whole: int
) -> dict[str, int]:
    """What `kernel.cu` is compiled with, ``kind`` forward or backward."""
    macros = {
        "DTYPE": _DTYPES[dtype], "LANES": plan.lanes, "NS": plan.states, "K": plan.channels, "WARPS": plan.warps,
        "HAS_Z": int(gated), "SOFTPLUS": int(softplus), "PACKED": int(packed), "WHOLE": whole,
        "MIN_BLOCKS": plan.min_blocks, "RELAY": int(plan.resident > 0),
    }  # fmt: skip
    if kind == "forward":
        macros |= {"FORWARD": 1, "ROUND": plan.tokens(dtype.itemsize)}
    else:
        macros |= {"SEGMENT": plan.segment, "SUB": plan.sub, "SAVE": plan.save}
    return macros


@functools.cache
def _module(
    kind: str, plan: Plan, dtype: torch.dtype, gated: bool, softplus: bool, packed: bool, whole: int, device: int
):
    macros = _macros(kind, plan, dtype, gated, softplus, packed, whole)
    return nvrtc.Module(_FOLDER, "kernel.cu", macros, device)


@functools.cache
def _portable(reason: str):
    """The Triton kernels, after one warning for every reason."""
    warnings.warn(
        f"mambakit: the selective scan runs on its slower Triton kernels: {reason}", UserWarning, stacklevel=4
    )
    from mambakit.ops.selective_scan import triton

    return triton


@functools.cache
def _fallback():
    """The Triton kernels when CUDA C++ cannot be compiled here, else None."""
    reason = nvrtc.available()
    return None if reason is None else _portable(reason)


@functools.cache
def _one_token():
    """Triton's kernel where it is there: one token moves states, which it reads as whole lines; twice as fast (docs/kernels.md)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from mambakit.ops.selective_scan import triton

    return triton


def _elsewhere(u: Tensor, A: Tensor):
    """The module that serves this call instead of the kernels here, or None."""
    if u.dtype == torch.float64 or u.numel() == 0 or A.shape[1] == 0:
        return chunked
    fallback = _fallback()
    if fallback is None and A.shape[1] > 256:
        return _portable(f"A has {A.shape[1]} states, the CUDA C++ kernels take 256")
    return fallback


def _gradient_elsewhere(u: Tensor, A: Tensor):
    """As `_elsewhere`: many states ask for more shared memory than a block has on cards before Hopper."""
    other = _elsewhere(u, A)
    if other is not None:
        return other
    shared = nvrtc.shared_memory(u.device.index)
    needed = backward_plan(*u.shape, A.shape[1], _multiprocessors(u.device.index), shared).backward_bytes
    if needed <= shared:
        return None
    return _portable(
        f"the gradient of {A.shape[1]} states takes {needed} bytes of shared memory, and a block of this GPU has {shared}"
    )


def _on_its_device(function):
    """Run with the device of the first tensor current: kernels launch in the current device's context."""

    @functools.wraps(function)
    def call(first, *rest):
        if first.device.index == torch._C._cuda_getDevice():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return call


def dense(t: Tensor) -> Tensor:
    """Contiguous, and placed where 16 bytes can be read at once."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else dense(t)


class _Operands(NamedTuple):
    """What the kernels need to know of u, delta, z, B, C and the like: they step through rows and time by stride."""

    # Kept until the launch: copies of those whose last dimension was not adjacent, or whose tokens were too far apart.
    tensors: list[Tensor | None]
    addresses: list[int]
    steps: list[int]  # elements between rows, then between tokens, of each
    whole: int  # so many neighbours along the last dimension can be read at once: 8, 4 or, for one by one, 0


def _operands(d: int, n: int, itemsize: int, *given: Tensor | None) -> _Operands:
    first = given[0]
    assert first is not None
    (b, length, _), dtypes, device = first.shape, (first.dtype,), first.get_device()
    tensors: list[Tensor | None] = []
    addresses, rows, tokens, odd = [], [], [], d | n
    for t in given:
        address = row = token = 0
        if t is not None:
            row, token, element = t.stride()
            if element != 1 or token >= _FARTHEST:
                t = t.contiguous()
                row, token, _ = t.stride()
            address = memory.address_of_rows(t, dtypes, (b, length, d if t.shape[2] == d else n), device)
            odd |= row | token | address // itemsize
        tensors.append(t)
        addresses.append(address)
        rows.append(row)
        tokens.append(token)
    return _Operands(tensors, addresses, rows + tokens, 0 if odd & 3 else 4 if odd & 7 else 8)


def _scratch(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """Memory for float32 arrays of these sizes, and where each begins, 16 bytes aligned."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // 4) * 16
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    address = memory.data_ptr()
    return memory, [address + start for start in starts]


def _turns_of(relays: int, device: torch.device) -> Tensor:
    """`turns` of a relay's kernel."""
    return torch.zeros(1 + relays, dtype=torch.int32, device=device)


def shared_floats(memory: Tensor, *shapes: tuple[int, ...], start: int = 0) -> list[Tensor]:
    """The arrays of `_scratch` as tensors, from the byte ``start`` on."""
    found = []
    for shape in shapes:
        count = math.prod(shape)
        found.append(memory[start : start + 4 * count].view(torch.float32).view(shape))
        start += -(-count // 4) * 16
    return found


def _chunk_length(length: int, chunks: int, interval: int) -> int:
    step = max(interval, _STEP)
    return -(-length // (chunks * step)) * step


def _number_sequences(kernel, stream, cu_seqlens, ids, from_state, to_state, state_size) -> None:
    """The sequence of each token, into ``ids``; states of sequences without a token are copied."""
    sequences, device = cu_seqlens.shape[0] - 1, cu_seqlens.get_device()
    rounds = min(64, -(-ids.shape[0] // (sequences * 1024)) + 1)
    kernel(
        sequences, 256, stream, *(nvrtc.address(t, INT32, device) for t in (cu_seqlens, ids)),
        *(nvrtc.address(t, FLOAT32, device) for t in (from_state, to_state)), state_size, blocks_y=rounds,
    )  # fmt: skip


class _ForwardCall(NamedTuple):
    """What a forward call of given shapes launches."""

    walk: nvrtc.Kernel
    find_sequences: nvrtc.Kernel
    blocks: int  # of one launch
    threads: int
    tiles: int
    chunk_length: int
    chunks: int
    padded: int  # states of a channel with padding
    relay: bool


# One look-up per call instead of the plan, the macros and the arithmetic: host time is what small calls wait for.
@functools.lru_cache(4096)
def _forward_call(
    b, length, d, n, dtype, gated, softplus, packed, whole, device, interval, one_chunk, in_parts
) -> _ForwardCall:  # fmt: skip
    plan = forward_plan(b, length, d, n, _multiprocessors(device), not (packed or in_parts))
    wanted = (
        1 if one_chunk else max(plan.chunks - in_parts, 1)
    )  # in parts all chunks are walked at once, else all but one
    chunk_length = _chunk_length(length, wanted, interval)
    chunks = -(-length // chunk_length)
    tiles = -(-d // plan.block_channels)
    module = _module("forward", plan._replace(chunks=1), dtype, gated, softplus, packed, whole, device)
    shared = plan.forward_bytes(dtype.itemsize, gated)
    if plan.resident:
        shared = max(shared, plan.relay_bytes(nvrtc.shared_memory(device)))
    return _ForwardCall(
        module.kernel("selective_scan_forward", shared), module.kernel("selective_scan_sequences"),
        b * tiles * (chunks if in_parts or plan.resident else max(chunks - 1, 1)), 32 * plan.warps, tiles, chunk_length,
        chunks, plan.lanes * plan.states, plan.resident > 0,
    )  # fmt: skip


class ForwardLaunch:
    """A forward call with its inputs laid out and its kernels found."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, slots, interval, one_chunk, in_parts):
        device = u.device
        b, length, d = u.shape
        n = A.shape[1]
        inputs = _operands(d, n, u.itemsize, u, delta, z, B, C)
        A, D, delta_bias, self.slots = _dense(A), _dense(D), _dense(delta_bias), _dense(slots)
        packed = cu_seqlens is not None
        self.call = call = _forward_call(
            b, length, d, n, u.dtype, z is not None, softplus, packed, inputs.whole, device.index, interval, one_chunk,
            in_parts,
        )  # fmt: skip
        chunks = call.chunks
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        self.scratch, local, sums = None, 0, 0
        if chunks > 1 or in_parts:
            self.scratch, (local, sums) = _scratch(device, b * chunks * d * call.padded, b * chunks * d)
        self.turns = _turns_of(b * call.tiles, device) if call.relay else None
        self.cu_seqlens = cu_seqlens.contiguous() if packed else None
        self.ids = torch.empty(length, dtype=torch.int32, device=device) if packed else None
        self.kept = inputs, A, D, delta_bias  # the launches read them
        self.device, self.dtype = u.get_device(), (u.dtype,)
        self.before = (*inputs.addresses, *(nvrtc.address(t, FLOAT32, self.device) for t in (A, D, delta_bias)))
        self.after = (
            local, sums, nvrtc.address(self.turns, INT32, self.device), *inputs.steps, length, d, n, call.tiles, call.chunk_length, chunks,
        )  # fmt: skip
        self.interval, self.state_size = interval, d * n

    def number_sequences(self, from_state: Tensor | None, to_state: Tensor | None) -> None:
        """Before the passes of a packed call; sequences without a token keep their state: it is copied."""
        if self.ids is not None:
            _number_sequences(
                self.call.find_sequences, self.stream, self.cu_seqlens, self.ids, from_state, to_state, self.state_size
            )  # fmt: skip

    def launch(self, passes: tuple[int, ...], initial, y, final, checkpoints) -> None:
        address, device = nvrtc.address, self.device
        fields = (
            *self.before, address(initial, FLOAT32, device),
            *(address(t, INT32, device) for t in (self.slots, self.ids, self.cu_seqlens)), address(y, self.dtype, device),
            address(final, FLOAT32, device), address(checkpoints, FLOAT32, device), *self.after,
        )  # fmt: skip
        for one in passes:
            self.call.walk(self.call.blocks, self.call.threads, self.stream, *fields, one, self.interval)


def new_outputs(u: Tensor, n: int, interval: int) -> tuple[Tensor, Tensor]:
    """Room for y, and for the checkpoints."""
    b, length, d = u.shape
    shape = (b, -(-length // interval), d, n) if interval else (0,)
    return (
        torch.empty((b, length, d), dtype=u.dtype, device=u.device),
        torch.empty(shape, dtype=torch.float32, device=u.device),
    )


def _launch_forward(u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial, final, slots, interval):
    # Several chunks of a packed row would read starting states that another chunk may have overwritten.
    one_chunk = cu_seqlens is not None and initial is final
    launch = ForwardLaunch(
        u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, slots, interval, one_chunk, False
    )  # fmt: skip
    y, checkpoints = new_outputs(u, A.shape[1], interval)
    launch.number_sequences(initial, None if initial is final else final)
    launch.launch((0,) if launch.call.chunks == 1 or launch.call.relay else (1, 2), initial, y, final, checkpoints)
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
    if other is None and u.shape[1] == 1 and cu_seqlens is None:
        other = _one_token()
    if other is not None:
        return other.forward_(state, slot_indices, u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens)
    pool = dense(state)
    y, _ = _launch_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, pool, pool, slot_indices, 0)
    if pool is not state:
        state.copy_(pool)
    return y


class _BackwardCall(NamedTuple):
    """What a backward call of given shapes launches."""

    walk: nvrtc.Kernel
    arrive: nvrtc.Kernel
    finish: nvrtc.Kernel
    find_sequences: nvrtc.Kernel
    threads: int
    tiles: int
    chunk_length: int
    chunks: int
    padded: int  # states of a channel with padding
    relay: bool


@functools.lru_cache(4096)
def _backward_call(b, length, d, n, dtype, gated, softplus, packed, whole, device, interval, in_parts) -> _BackwardCall:
    shared = nvrtc.shared_memory(device)
    plan = backward_plan(b, length, d, n, _multiprocessors(device), shared, not (packed or in_parts))
    if plan.backward_bytes > shared:  # of a row in parts alone: other gradients are elsewhere by now
        raise RuntimeError(
            f"the gradient of {n} states in a row that is spread over GPUs takes {plan.backward_bytes} bytes of shared memory, and a "
            f"block of this one has {shared}: give each GPU whole rows"
        )
    chunk_length = _chunk_length(length, plan.chunks, interval)
    module = _module("backward", plan._replace(chunks=1), dtype, gated, softplus, packed, whole, device)
    return _BackwardCall(
        module.kernel("selective_scan_backward", plan.backward_bytes),
        module.kernel("selective_scan_arrive"),
        module.kernel("selective_scan_finish"),
        module.kernel("selective_scan_sequences"),
        32 * plan.warps, -(-d // plan.block_channels), chunk_length, -(-length // chunk_length), plan.lanes * plan.states,
        plan.resident > 0,
    )  # fmt: skip


class BackwardLaunch:
    """A gradient with its inputs laid out, its kernels found and room for its results."""

    def __init__(
        self, dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
        in_parts, dz=None,
    ):  # fmt: skip
        device = u.device
        b, length, d = u.shape
        n = A.shape[1]
        inputs = _operands(d, n, u.itemsize, dy, u, delta, z, B, C)
        A, D, delta_bias, initial = map(_dense, (A, D, delta_bias, initial_state))
        packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if packed else b
        self.call = call = _backward_call(
            b, length, d, n, u.dtype, z is not None, delta_softplus, packed, min(inputs.whole, 4), device.index, interval,
            in_parts,
        )  # fmt: skip
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        self.shape, self.first, self.interval = (b, length, d, n), 0 if in_parts else 1, interval
        float32 = {"dtype": torch.float32, "device": device}
        self.du, self.ddelta = (torch.empty((b, length, d), dtype=u.dtype, device=device) for _ in range(2))
        if z is None:
            self.dz, self.dz_steps = torch.empty(0, dtype=u.dtype, device=device), [0, 0]
        else:
            self.dz = torch.empty((b, length, d), dtype=u.dtype, device=device) if dz is None else dz
            self.dz_steps = list(self.dz.stride()[:2])
        self.dB, self.dC = (torch.empty((b, length, n), dtype=u.dtype, device=device) for _ in range(2))
        self.dinitial = torch.empty((self.sequences, d, n) if initial is not None else (0,), **float32)
        self.dA = torch.empty((d, n), **float32)
        self.dD, self.dbias = (torch.empty(d, **float32) for _ in range(2))
        parts = b * call.chunks  # of the sums over rows and time
        between = parts if call.chunks > 1 or in_parts else 0  # what chunks hand to each other
        self.scratch, self.places = _scratch(
            device, call.tiles * b * length * 2 * call.padded, parts * d * n, parts * d, parts * d, between * d * n,
            between * d,
        )  # fmt: skip
        self.turns = _turns_of(b * call.tiles, device) if call.relay else None
        self.cu_seqlens = cu_seqlens.contiguous() if packed else None
        self.ids = torch.empty(length, dtype=torch.int32, device=device) if packed else None
        self.kept = inputs, A, D, delta_bias, initial, checkpoints  # the launches read them

    def _fields(self, dfinal: Tensor | None) -> tuple[int, ...]:
        inputs, A, D, delta_bias, initial, checkpoints = self.kept
        b, length, d, n = self.shape
        call = self.call
        partial, dA_parts, dD_parts, dbias_parts, local, sums = self.places
        to = self.dinitial if initial is not None else None
        address, device, dtype = nvrtc.address, self.du.get_device(), (self.du.dtype,)
        dz = memory.address_of_rows(self.dz, dtype, self.dz.shape, device)  # it may be half of a wider tensor
        return (
            *inputs.addresses,
            *(address(t, FLOAT32, device) for t in (A, D, delta_bias, initial, dfinal, checkpoints)),
            *(address(t, INT32, device) for t in (self.ids, self.cu_seqlens)),
            *(address(t, dtype, device) for t in (self.du, self.ddelta)), dz, address(to, FLOAT32, device), local, sums,
            partial, dA_parts, dD_parts, dbias_parts, address(self.turns, INT32, device), *inputs.steps, *self.dz_steps, length, d, n, call.tiles, call.chunk_length, call.chunks, self.first, b * length,
            self.interval,
        )  # fmt: skip

    def number_sequences(self, dfinal: Tensor | None) -> None:
        """Before a packed call; the gradient of a sequence without a token passes through: it is copied."""
        if self.ids is not None:
            to = self.dinitial if self.dinitial.numel() else None
            _number_sequences(
                self.call.find_sequences, self.stream, self.cu_seqlens, self.ids, dfinal, to, self.shape[2] * self.shape[3]
            )  # fmt: skip

    def arrive(self, dfinal: Tensor | None) -> None:
        call, (b, *_) = self.call, self.shape
        call.arrive(b * call.tiles * (call.chunks - self.first), call.threads, self.stream, *self._fields(dfinal))

    def finish(self, dfinal: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients, in the op's order."""
        call, (b, length, d, n) = self.call, self.shape
        call.walk(b * call.tiles * call.chunks, call.threads, self.stream, *self._fields(dfinal))
        partial, dA_parts, dD_parts, dbias_parts, *_ = self.places
        address, device, dtype = nvrtc.address, self.du.get_device(), (self.du.dtype,)
        blocks = -(-b * length * call.padded // 2 // 256) + -(-(d * n + 2 * d) // 256)
        call.finish(
            blocks, 256, self.stream, partial, dA_parts, dD_parts, dbias_parts,
            *(address(t, dtype, device) for t in (self.dB, self.dC)),
            *(address(t, FLOAT32, device) for t in (self.dA, self.dD, self.dbias)), b * length, call.tiles, n, d, b * call.chunks,
        )  # fmt: skip
        _, _, D, delta_bias, *_ = self.kept
        empty = self.dA.new_empty(0)
        return (
            self.du, self.ddelta, self.dA, self.dB, self.dC, empty if D is None else self.dD, self.dz,
            empty if delta_bias is None else self.dbias, self.dinitial,
        )  # fmt: skip


@_on_its_device
def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval,
    dz=None,
):  # fmt: skip
    """`mambakit::selective_scan_backward`; the gradient of z into ``dz`` (b, l, d) where it is given.

    Its channels are adjacent and its tokens fewer than 2**26 elements apart; where d is a multiple of 4, its other strides and its place
    in memory are, too.
    """
    other = _gradient_elsewhere(u, A)
    if other is not None:
        found = other.backward(
            dy, dfinal, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints,
            interval,
        )  # fmt: skip
        return found if dz is None else (*found[:6], dz.copy_(found[6]), *found[7:])
    launch = BackwardLaunch(
        dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, interval, False,
        dz,
    )  # fmt: skip
    dfinal = _dense(dfinal)
    launch.number_sequences(dfinal)
    if launch.call.chunks > 1 and not launch.call.relay:
        launch.arrive(dfinal)
    return launch.finish(dfinal)
