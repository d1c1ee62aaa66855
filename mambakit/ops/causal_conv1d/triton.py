"""causal_conv1d on a GPU, in Triton. Contract: `chunked.py` and `api.py`; the kernels are in `triton_kernels.py`.

Other widths than 2 to 8, and float64, go to `chunked.py`, which is PyTorch and runs on any device.

The op is memory bound: forward reads x and writes y, backward reads x and dy and writes dx; arithmetic is hidden as
long as it stays below about 38 instructions per element forward and 57 backward on an H100. So every thread has a few
neighbouring channels (16 bytes of them) and steps through STEPS consecutive positions (a walk) with the last k - 1
inputs in registers: each input is loaded and converted once, and the k - 1 inputs before a walk are its only extra
reads. A program is ROWS walks of BLOCK_D channels; the walks of all batch rows are numbered consecutively, so that
short rows do not leave a program half empty.

Backward is tiled the same way. It recomputes the pre-activation from x (one sigmoid per element, against a whole tensor
saved and read), keeps the k - 1 unfinished values of dx in registers, and runs k - 1 positions past its end because
dx there still needs them. dweight and dbias are summed over a program's walks, written as one partial per program and
added in a fixed order by a second kernel: no atomics, so the same inputs give the same bits.

(b, d, l) memory has kernels of its own: a warp's lanes are tokens of one channel there. A lane has 16 bytes of
neighbouring tokens (`triton_vectors_kernels.py`); one (`triton_tokens_kernels.py`) of packed sequences, of those with
states, and in memory of which `_vector` has no aligned vectors.

Packed sequences: one small kernel writes, for every position, where its sequence starts and which sequence it is (found
on the device, so the op can be captured in a CUDA graph); walks then reset their window at a start.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.ops._layout import dense_as, empty_as, is_transposed
from mambakit.ops.causal_conv1d import chunked
from mambakit.ops.causal_conv1d import triton_kernels as kernels
from mambakit.ops.causal_conv1d import triton_tokens_kernels as tokens_kernels
from mambakit.ops.causal_conv1d import triton_vectors_kernels as vectors_kernels


class Tile(NamedTuple):
    """One program: `rows` walks of `steps` positions over `block_d` channels, loading `unroll` steps ahead."""

    block_d: int
    rows: int
    steps: int
    unroll: int
    num_warps: int


# The longest sequence that one program of `decode_kernel` convolves; longer ones are cut into walks and take a second
# launch.
_DECODE_STEPS = 32


@functools.cache
def _processors(device: torch.device) -> int:
    # On a CPU the kernels run in Triton's interpreter, where any tile serves.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile(x: Tensor, channels: int, steps: int, unroll: int) -> Tile:
    """`channels` per thread, 16 bytes at most; walks as long as possible with about 8 programs per SM."""
    block_d, num_warps = 64, 4
    rows = 32 * num_warps * min(channels, 16 // x.element_size()) // block_d
    b, length, d = x.shape
    wanted = 8 * _processors(x.device)
    while steps > 8 and (
        steps >= 2 * length or triton.cdiv(b * triton.cdiv(length, steps), rows) * triton.cdiv(d, block_d) < wanted
    ):
        steps //= 2
    return Tile(block_d, rows, steps, min(unroll, steps), num_warps)


def forward_tile(x: Tensor, k: int, restarts: bool) -> Tile:
    """128 registers for bfloat16 and k = 4 (sm_90); long filters take half the channels to stay near that.

    `restarts`: packed sequences with initial states start anywhere in a row. Unrolling that code takes seconds to
    compile.
    """
    return _tile(x, 8 if k <= 4 else 4, 128, 2 if restarts else 8 if k <= 4 else 4)


def backward_tile(x: Tensor, k: int, restarts: bool) -> Tile:
    """Window, unfinished dx and sums of dweight are 3 k registers a channel: 128 in all at 4 channels, 249 at 8."""
    return _tile(x, 4 if k <= 4 else 2, 128, (2 if restarts else 4) if k <= 4 else (1 if restarts else 2))


def _rows_in_place(x: Tensor) -> tuple[Tensor, int, int]:
    """x with its channels adjacent, and its batch and time strides (0 for a single row: PyTorch's is arbitrary)."""
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _sequences(cu_seqlens: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        return None, None
    # Tensors also for an empty row: the kernels that write its states take them.
    starts, ids = torch.empty(2, length, dtype=torch.int32, device=cu_seqlens.device)
    if length:
        kernels.sequences_kernel[(triton.cdiv(length, 256),)](
            cu_seqlens, starts, ids, length, cu_seqlens.shape[0] - 1, BLOCK=256
        )
    return starts, ids


def _on_kernels(x: Tensor, k: int) -> bool:
    return 2 <= k <= 8 and x.dtype != torch.float64


_PROGRAM = 1024  # elements of a program of (b, d, l) memory, of 4 warps
_STATES = 64  # channels of a program that writes states


def _run(length: int) -> tuple[int, int]:
    """(channels, tokens) of a program of (b, d, l) memory."""
    tokens = min(max(triton.next_power_of_2(length), 64), _PROGRAM)
    return _PROGRAM // tokens, tokens


def _vector(*tensors: Tensor) -> int:
    """The tokens of 16 bytes, where tensors in (b, d, l) memory can be read in aligned vectors of them; else 0.

    Each row must begin as far from a multiple of 16 bytes as the same row of a dense result does. So do the rows of
    dense tensors and, mostly, of half of their channels. The last vector must be whole: what follows may not exist.
    """
    b, length, d = tensors[0].shape
    vector = 16 // tensors[0].element_size()
    whole = tensors[0].numel() % vector == 0 and all(
        t.data_ptr() % 16 == 0
        and (t.stride(2) - length) % vector == 0
        and (b == 1 or (t.stride(0) - d * length) % vector == 0)
        for t in tensors
    )
    return vector if whole else 0


def _lanes(length: int, vector: int) -> tuple[int, int, int]:
    """(channels, vectors of each) of a tile of 4 warps; and the vectors of a row, wherever in one it begins.

    Of uneven rows, a program has several narrow tiles, not one wide: the indices take more instructions there, and less
    of a short row's last tile is empty.
    """
    vectors = triton.cdiv(length + vector - math.gcd(length, vector), vector)
    widest = 32 if length % vector == 0 else 8 if vectors > 64 else 4
    lanes = min(triton.next_power_of_2(vectors), widest)
    return 128 // lanes, lanes, vectors


def _steps(device: torch.device, programs: int, own: int, extent: int, uneven: bool) -> tuple[int, int]:
    """(tiles of a program, programs of a row) of the given extent, of which a tile has ``own``.

    As many tiles, a power of two, as leave about 8 programs per SM. Of uneven rows, whose programs take more
    instructions to begin, about 4 programs, and any number of tiles, so that few are empty.
    """
    steps, wanted = 16, (4 if uneven else 8) * _processors(device)
    while steps > 1 and (own * steps >= 2 * extent or programs * triton.cdiv(extent, own * steps) < wanted):
        steps //= 2
    chunks = triton.cdiv(extent, own * steps)
    return triton.cdiv(extent, own * chunks) if uneven else steps, chunks


def _convolve_tokens(x, weight, bias, activation, state, slots, cu_seqlens, final_dtype) -> tuple[Tensor, Tensor]:
    """`_convolve` of (b, d, l) memory."""
    b, length, d = x.shape
    k = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = empty_as(x)
    final = torch.empty((sequences, d, k - 1), dtype=final_dtype, device=x.device)
    rows, tokens = _run(length)
    starts, ids = _sequences(cu_seqlens, length)
    if state is None and cu_seqlens is None and (vector := _vector(x)):
        rows, lanes, vectors = _lanes(length, vector)
        programs = triton.cdiv(b * d, rows)
        steps, chunks = 1, triton.cdiv(vectors, lanes)
        if length % vector:
            steps, chunks = _steps(x.device, programs, lanes, vectors, uneven=True)
        programs *= chunks
        vectors_kernels.forward_kernel[(programs + b * triton.cdiv(d, _STATES),)](
            x, weight, bias, y, final,
            length, d, chunks, b * d, programs, x.stride(0), x.stride(2), *weight.stride(),
            K=k, ROWS=rows, LANES=lanes, VECTOR=vector, EVEN=length % vector == 0, STEPS=steps,
            KP=triton.next_power_of_2(k - 1), BLOCK_D=_STATES, SILU=activation == "silu", HAS_BIAS=bias is not None,
            num_warps=4,
        )  # fmt: skip
        return y, final
    chunks = triton.cdiv(length, tokens)
    programs = triton.cdiv(b * d, rows) * chunks
    grid = programs + sequences * triton.cdiv(d, _STATES)
    if grid:
        tokens_kernels.forward_kernel[(grid,)](
            x, weight, bias, state, slots, starts, ids, cu_seqlens, y, final,
            length, d, chunks, b * d, programs, x.stride(0), x.stride(2), *weight.stride(),
            *((0, 0, 0) if state is None else state.stride()),
            K=k, ROWS=rows, TOKENS=tokens, KP=triton.next_power_of_2(k - 1), BLOCK_D=_STATES,
            SILU=activation == "silu", HAS_BIAS=bias is not None, HAS_INITIAL=state is not None,
            HAS_SLOTS=slots is not None, PACKED=cu_seqlens is not None, num_warps=4,
        )  # fmt: skip
    return y, final


def _differentiate_tokens(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens):
    """`backward` of (b, d, l) memory."""
    b, length, d = x.shape
    k = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dy = dy if is_transposed(dy) else dense_as(dy, x)
    dx = empty_as(x)
    dweight = torch.empty((d, k), dtype=weight.dtype, device=x.device)
    dbias = weight.new_empty(0) if bias is None else torch.empty(d, dtype=bias.dtype, device=x.device)
    dinitial = x.new_empty(0)
    if initial_state is not None:
        dinitial = torch.empty((sequences, d, k - 1), dtype=initial_state.dtype, device=x.device)
    vector = _vector(x, dy) if dfinal is None and initial_state is None and cu_seqlens is None else 0
    if vector:
        rows, own, extent = _lanes(length, vector)
    else:
        rows, tokens = 8, 64  # a lane has 4 elements: the sums of dweight take k + 1 registers for each
        own, extent = tokens - (k - 1), length
    programs = triton.cdiv(b * d, rows)
    steps, chunks = _steps(x.device, programs, own, extent, uneven=vector > 0 and length % vector > 0)
    programs *= chunks
    starts, ids = _sequences(cu_seqlens, length)
    partials = torch.empty((b * chunks, k + 1, d), dtype=torch.float32, device=x.device)
    grid = programs + (0 if initial_state is None else sequences * triton.cdiv(d, _STATES))
    if vector:
        vectors_kernels.backward_kernel[(programs,)](
            dy, x, weight, bias, dx, partials,
            length, d, chunks, b * d, dy.stride(0), dy.stride(2), x.stride(0), x.stride(2), *weight.stride(),
            K=k, ROWS=rows, LANES=own, VECTOR=vector, EVEN=length % vector == 0, STEPS=steps,
            SILU=activation == "silu", HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    elif grid:
        tokens_kernels.backward_kernel[(grid,)](
            dy, dfinal, x, weight, bias, initial_state, starts, ids, cu_seqlens, dx, partials, dinitial,
            length, d, chunks, b * d, programs, dy.stride(0), dy.stride(2), x.stride(0), x.stride(2),
            *weight.stride(), *((0, 0, 0) if initial_state is None else initial_state.stride()),
            K=k, ROWS=rows, TOKENS=tokens, STEPS=steps, BLOCK_D=_STATES, SILU=activation == "silu",
            HAS_BIAS=bias is not None,
            HAS_INITIAL=initial_state is not None, HAS_DFINAL=dfinal is not None, PACKED=cu_seqlens is not None,
            num_warps=4,
        )  # fmt: skip
    if d:
        kernels.sum_partials_kernel[(triton.cdiv(d, 32), k + (bias is not None))](
            partials, dweight, dbias, b * chunks, d, K=k, HAS_BIAS=bias is not None, ROWS=128, BLOCK_D=32
        )
    return dx, dweight, dbias, dinitial


def _convolve(x, weight, bias, activation, state, slots, cu_seqlens, final_dtype) -> tuple[Tensor, Tensor]:
    if is_transposed(x):
        return _convolve_tokens(x, weight, bias, activation, state, slots, cu_seqlens, final_dtype)
    b, length, d = x.shape
    k = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty((b, length, d), dtype=x.dtype, device=x.device)
    final = torch.empty((sequences, d, k - 1), dtype=final_dtype, device=x.device)
    tile = forward_tile(x, k, restarts=cu_seqlens is not None and state is not None)
    x, stride_b, stride_t = _rows_in_place(x)
    starts, ids = _sequences(cu_seqlens, length)
    chunks = triton.cdiv(length, tile.steps)
    programs = triton.cdiv(b * chunks, tile.rows)
    grid = (programs + sequences) * triton.cdiv(d, tile.block_d)
    if grid:
        kernels.forward_kernel[(grid,)](
            x, weight, bias, state, slots, starts, ids, cu_seqlens, y, final,
            length, d, max(chunks, 1), b * chunks, programs,
            stride_b, stride_t, *weight.stride(), *((0, 0, 0) if state is None else state.stride()),
            K=k, ROWS=tile.rows, STEPS=tile.steps, BLOCK_D=tile.block_d, UNROLL=tile.unroll,
            KP=triton.next_power_of_2(k - 1), SILU=activation == "silu", HAS_BIAS=bias is not None,
            HAS_INITIAL=state is not None, HAS_SLOTS=slots is not None, PACKED=cu_seqlens is not None,
            num_warps=tile.num_warps,
        )  # fmt: skip
    return y, final


def forward(x, weight, bias, activation, initial_state, cu_seqlens):
    """`mambakit::causal_conv1d`: (y, final_state)."""
    if not _on_kernels(x, weight.shape[1]):
        return chunked.forward(x, weight, bias, activation, initial_state, cu_seqlens)
    with torch.cuda.device_of(x):
        bias = None if bias is None else bias.contiguous()
        return _convolve(x, weight, bias, activation, initial_state, None, cu_seqlens, x.dtype)


def backward(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens, dx=None):
    """`mambakit::causal_conv1d_backward`: (dx, dweight, dbias, dinitial_state);

    ``dx`` (b, l, d), if given, is written.
    """
    if not _on_kernels(x, weight.shape[1]):
        found = chunked.backward(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens)
        return found if dx is None else (dx.copy_(found[0]), *found[1:])
    b, length, d = x.shape
    k = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.cuda.device_of(x):
        bias = None if bias is None else bias.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        if dx is None and is_transposed(x):
            return _differentiate_tokens(dy, dfinal, x, weight, bias, activation, initial_state, cu_seqlens)
        if dx is None:
            dx = torch.empty((b, length, d), dtype=x.dtype, device=x.device)
        dweight = torch.empty((d, k), dtype=weight.dtype, device=x.device)
        dbias = weight.new_empty(0) if bias is None else torch.empty(d, dtype=bias.dtype, device=x.device)
        dinitial = x.new_empty(0)
        if initial_state is not None:
            dinitial = torch.empty((sequences, d, k - 1), dtype=initial_state.dtype, device=x.device)
        tile = backward_tile(x, k, restarts=cu_seqlens is not None and initial_state is not None)
        x, stride_xb, stride_xt = _rows_in_place(x)
        dy, stride_yb, stride_yt = _rows_in_place(dy)
        starts, ids = _sequences(cu_seqlens, length)
        chunks = triton.cdiv(length, tile.steps)
        programs = triton.cdiv(b * chunks, tile.rows)
        partials = torch.empty((programs, k + 1, d), dtype=torch.float32, device=x.device)
        grid = (programs + (0 if initial_state is None else sequences)) * triton.cdiv(d, tile.block_d)
        if grid:
            kernels.backward_kernel[(grid,)](
                dy, dfinal, x, weight, bias, initial_state, starts, ids, cu_seqlens, dx, partials, dinitial,
                length, d, max(chunks, 1), b * chunks, programs,
                stride_yb, stride_yt, stride_xb, stride_xt, *dx.stride()[:2], *weight.stride(),
                *((0, 0, 0) if initial_state is None else initial_state.stride()),
                K=k, ROWS=tile.rows, STEPS=tile.steps, BLOCK_D=tile.block_d, UNROLL=tile.unroll,
                SILU=activation == "silu", HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None,
                HAS_DFINAL=dfinal is not None, PACKED=cu_seqlens is not None,
                num_warps=tile.num_warps,
            )  # fmt: skip
        if d:
            kernels.sum_partials_kernel[(triton.cdiv(d, 32), k + (bias is not None))](
                partials, dweight, dbias, programs, d, K=k, HAS_BIAS=bias is not None, ROWS=128, BLOCK_D=32
            )
    return dx, dweight, dbias, dinitial


def forward_(state, slot_indices, x, weight, bias, activation, cu_seqlens):
    """`mambakit::causal_conv1d_`: y; ``state`` (slots, d, k - 1) is read and written at ``slot_indices``."""
    if not _on_kernels(x, weight.shape[1]) or state.dtype == torch.float64:
        return chunked.forward_(state, slot_indices, x, weight, bias, activation, cu_seqlens)
    b, length, d = x.shape
    k = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.cuda.device_of(x):
        bias = None if bias is None else bias.contiguous()
        slots = None if slot_indices is None else slot_indices.contiguous()
        # The lengths of packed sequences are known on the device only: decide by their mean.
        longest = _DECODE_STEPS if cu_seqlens is None else _DECODE_STEPS + 4 * sequences
        if length > longest or is_transposed(x):
            # Two walks may read one state, so it is written only after all of them, from a copy.
            y, final = _convolve(x, weight, bias, activation, state, slots, cu_seqlens, state.dtype)
            if final.numel():
                kernels.scatter_kernel[(sequences, triton.cdiv(d * (k - 1), 1024))](
                    final, state, slots, d, *state.stride(), K=k, BLOCK=1024, HAS_SLOTS=slots is not None
                )
            return y
        y = torch.empty((b, length, d), dtype=x.dtype, device=x.device)
        x, stride_b, stride_t = _rows_in_place(x)
        grid = sequences * triton.cdiv(d, 128)
        if grid:
            kernels.decode_kernel[(grid,)](
                state, slots, x, weight, bias, cu_seqlens, y,
                length, d, stride_b, stride_t, *weight.stride(), *state.stride(),
                K=k, BLOCK_D=128, UNROLL=1 if length == 1 else 4, SILU=activation == "silu",
                HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None, PACKED=cu_seqlens is not None,
                num_warps=1,
            )  # fmt: skip
    return y
