"""One token through a whole model in one kernel that stays on the card: up to 8 rows, bfloat16, float16, int8 or int4 weights.

`persistent.cu` says how it works; docs/kernels.md what it reaches. Like the scan it is CUDA C++ compiled at run time, once for each
shape of model and number of rows.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.memory import all_plain, zeros
from mambakit.ops.decode.weights import ModelWeights, check_states, shape_of, tensors_of

MOST_ROWS = 8
_N, _FIELDS, _SLICES = 16, 14, 8
# What `PersistentStep.cycles` are of: a layer's, added up, and the head's last.
PARTS = (
    "stream", "in_proj", "conv", "x_proj", "meet", "dt_proj", "state", "meet again", "out_proj", "sum", "head",
)  # fmt: skip
_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
# What the kernel reads and writes: weights, packed ones, scales and states, tokens and sums.
_READ = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int16, torch.int32, torch.int64)


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """(multiprocessors, shared bytes of a block)."""
    return torch.cuda.get_device_properties(device).multi_processor_count, nvrtc.shared_memory(device)


@functools.cache
def _kernel(macros: tuple[tuple[str, int], ...], device: int) -> nvrtc.Kernel:
    module = nvrtc.Module(Path(__file__).parent, "persistent.cu", dict(macros), device)
    return module.kernel("decode_step", dict(macros)["SHARED"], cooperative=True)


class _Params(ctypes.Structure):
    """`Params` of persistent.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in [
                "layers",
                "embeddings",
                "final_norm",
                "head",
                "head_scales",
                "conv_states",
                "ssm_states",
                "tokens",
                "position",
                "history",
                "logits",
                "stream",
                "squares",
                "y",
                "sums",
                "best",
                "counter",
                "slot",
            ]
        ),
        *((name, ctypes.c_int64) for name in ("eps_bits", "capacity", "choose")),
        ("cycles", ctypes.c_void_p),
    ]


def _lines(size: int) -> int:
    return -(-size // 128) * 128


def _slot_bytes(bits: int) -> int:
    return 2560 if bits else 2048


def _queue(bits: int, rows: int, pieces: int) -> tuple[int, int, int]:
    """(slots of a warp's ring, those filled again at once at the end of a phase, cycles between two of the others).

    ``pieces`` are a warp's of a layer. Measured on an H100 (docs/kernels.md). A deep queue of weights keeps the memory busy, and holds up what the blocks tell each
    other: small and packed models are bound by the latter.
    """
    if bits or pieces <= 12:
        return 4, 4, 0
    return (8, 4, 1000) if rows <= 4 else (3, 3, 0)


def _fixed_bytes(
    grid: int, rows: int, h: int, d: int, v: int, rank: int, layers: int, a_bytes: int, buffers: int, warps: int
) -> int:
    """What persistent.cu keeps in shared memory beside its rings."""
    channels, stream, words = (-(-size // grid) for size in (d, h, v))
    runs = 4 + 2 * -(-words // (16 * warps)) + 1
    padded = -(-channels // 16) * 16
    columns, r = -(-(channels + 7) // 16) * 16, rank + 2 * _N
    small = _lines(r * (columns * 2 + 16)) + _lines(padded * rank * 2) + _lines(channels * _N * a_bytes)
    sizes = [
        (layers + 1) * _FIELDS * 8, warps * runs * 32, rows * (max(h, d) * 2 + 64), warps * 2 * 16 * 8 * 4, buffers * small, 8 * (columns + 8) * 2,
        rows * channels * 4, padded * 8 * 4, 8 * (rank + 8) * 2, rows * 2 * _N * 4, stream * rows * 4, rows * _SLICES * 4,
        rows * 8, rows * 8, 4,
    ]  # fmt: skip
    return sum(map(_lines, sizes))


def _plan(
    weights: ModelWeights,
    rows: int,
    conv_dtype: torch.dtype,
    limits: tuple[int, int],
    warps: int | None = None,
    queue: tuple[int, int, int] | None = None,
    trial: bool = False,
) -> dict[str, int] | str:
    """The kernel's macros, or why it cannot serve; ``warps`` and ``queue`` replace what is chosen here."""
    if not 1 <= rows <= MOST_ROWS:
        return f"{rows} rows; it serves 1 to {MOST_ROWS}"
    layers, dtype = weights.layers, weights.final_norm.dtype
    if not layers:
        return "no layers"
    bits, group = weights.kind or (0, 0)
    first = layers[0]
    (v, h), (_, d) = shape_of(weights.head), shape_of(first.x_proj)
    rank, n, width = first.dt_proj.shape[1], first.A_log.shape[1], first.conv.shape[1]
    grid, shared = limits
    columns = {0: 64, 8: 128, 4: 256}[bits]
    channels, stream = -(-d // grid), -(-h // grid)
    if dtype not in _DTYPES:
        return f"{dtype} weights; it serves {', '.join(map(str, _DTYPES))}"
    if grid > 255:
        return f"{grid} multiprocessors; a byte counts them"
    if n != _N or not 2 <= width <= 8 or rank % 16 or h % columns or d % columns or v < grid or d < grid or h < grid:
        return f"shape h={h}, d={d}, n={n}, rank={rank}, width={width}, v={v}"
    c_tiles, s_tiles = -(-channels // 16), -(-stream // 16)
    # 8 warps were faster than 16 on an H100; each has at most two tiles of a phase. Not by rows: the order of sums depends on it.
    warps = next((w for w in ([warps] if warps else (8, 16)) if max(2 * c_tiles, s_tiles, rows) <= w), None)
    if warps is None:
        return f"{channels} channels and {stream} rows of the stream for each of {grid} blocks"
    scan_dtype = first.A_log.dtype
    if conv_dtype not in (dtype, torch.float32) or scan_dtype not in (dtype, torch.float32):
        return f"states of {conv_dtype} or A_log of {scan_dtype} with weights of {dtype}"
    for w in layers:
        plain = [w.norm, w.conv, w.dt_proj, w.in_proj_bias, w.conv_bias, w.out_proj_bias]
        large = [t for t in (w.in_proj, w.x_proj, w.out_proj) if isinstance(t, Tensor)]
        scan = [w.A_log, w.D, w.dt_bias]
        same = all(t is None or t.dtype == dtype for t in (*plain, *large)) and all(t.dtype == scan_dtype for t in scan)
        every = [t for weight in (w.in_proj, w.x_proj, w.out_proj) for t in tensors_of(weight)] + plain + scan
        if not same or not all_plain(every) or any(t is not None and not t.is_contiguous() for t in every):
            return "layers of other dtypes, or weights that are no plain contiguous tensors"
        if any(
            t.data_ptr() % 16 for t in (w.in_proj, w.x_proj, w.out_proj, w.dt_proj, w.A_log) if isinstance(t, Tensor)
        ):
            return "weights that are not aligned to 16 bytes"
    ends = [weights.embeddings, weights.final_norm, *tensors_of(weights.head)]
    if not all_plain(ends) or any(t is not None and not t.is_contiguous() for t in ends):
        return "embeddings, a last norm or a head that are no plain contiguous tensors"
    most, flowing, pace = queue or _queue(bits, rows, (2 * c_tiles * h + s_tiles * d) // columns // warps)
    for buffers in (2, 1):
        fixed = _fixed_bytes(grid, rows, h, d, v, rank, len(layers), first.A_log.itemsize, buffers, warps)
        slots = min(most, (shared - fixed) // (warps * _slot_bytes(bits)))
        if slots >= 2:
            break
    if slots < 1:
        return f"{fixed} bytes of shared memory beside the weights' ring, of {shared}"
    return {
        "WARPS": warps, "DTYPE": _DTYPES[dtype], "BITS": bits, "GROUP": group, "ROWS": rows, "GRID": grid, "H": h, "D": d,
        "RANK": rank, "WIDTH": width, "VOCABULARY": v, "LAYERS": len(layers), "SCAN_FLOAT": int(scan_dtype == torch.float32),
        "CONV_FLOAT": int(conv_dtype == torch.float32), "TRIAL": int(trial), "SLOTS": slots, "DEFER": max(0, slots - flowing),
        "PACE": pace, "BUFFERS": buffers,
        "SHARED": fixed + warps * slots * _slot_bytes(bits),
    }  # fmt: skip


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot be made for this GPU, or None when it can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return nvrtc.available()


def why_not(weights: ModelWeights, rows: int, conv_dtype: torch.dtype) -> str | None:
    """Why `PersistentStep` cannot run these weights on their device, or None when it can."""
    device = weights.final_norm.device
    if device.type != "cuda":
        return f"the weights are on {device}"
    reason = unavailable(device)
    if reason is not None:
        return reason
    plan = _plan(weights, rows, conv_dtype, _limits(device.index))
    return plan if isinstance(plan, str) else None


class PersistentStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    Arguments and attributes are `mambakit.ops.decode.triton_many_rows.ManyRowsStep`'s; for benchmarks, ``warps`` that work, ``queue`` (slots of a
    warp's ring, those filled again at once at the end of a phase, cycles between two of the others), and ``clock``, which keeps ``cycles`` (`PARTS`,) of one block.
    A row's bits do not depend on the other rows, nor on how many there are. The kernel needs all of the card's multiprocessors at once: launched while other work runs, it waits.

    With ``trial`` the rows are the next tokens of one text, at most 8: their logits, and the states after each of them. The states
    have a slot more than there are tokens; ``slot`` (1,) int64 names the one that is read, the state after the first token goes into the
    next, and so on round: to keep m tokens, add m to ``slot``, modulo the number of slots.

    Raises:
        ValueError: what it cannot serve; `why_not` tells beforehand.
    """

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        warps: int | None = None,
        queue: tuple[int, int, int] | None = None,
        clock: bool = False,
        trial: bool = False,
    ):
        rows, device = ssm_states.shape[1] - trial, weights.embeddings.device
        check_states(conv_states, ssm_states)
        plan = _plan(weights, rows, conv_states.dtype, _limits(device.index), warps, queue, trial)
        if isinstance(plan, str):
            raise ValueError(f"PersistentStep: {plan}")
        h, v = plan["H"], plan["VOCABULARY"]

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return zeros(*shape, dtype=dtype, device=device)

        index = weights.embeddings.get_device()

        def address(t: Tensor | None) -> int:
            """Of a tensor whose dtype and shape `_plan` has checked, or that was made here."""
            return nvrtc.address(t, _READ, index)

        self.tokens, self.position = buffer(rows, dtype=torch.int64), buffer(1, dtype=torch.int64)
        self.slot = buffer(1, dtype=torch.int64)
        self.history = buffer(rows, max(1, capacity), dtype=torch.int64)
        self.logits = buffer(rows, v)
        sums = buffer(2, 4, rows, plan["RANK"] + 2 * _N, dtype=torch.int64)
        # Places where values will be: all ones, which no value is.
        stream, y = (buffer(*shape, dtype=torch.int16).sub_(1) for shape in ((4, rows, h), (2, rows, plan["D"])))
        squares = buffer(4, rows, 16, dtype=torch.int64)
        best, counter = buffer(rows, dtype=torch.int64), buffer(64, dtype=torch.int32)
        table, kept = [], []
        for w in weights.layers:
            # x_proj is small, and read by channel: packed ones are widened once.
            x_proj = (
                w.x_proj
                if isinstance(w.x_proj, Tensor)
                else w.x_proj.dequantized().to(weights.final_norm.dtype).contiguous()
            )
            fields = [
                w.norm, *tensors_of(w.in_proj), w.in_proj_bias, w.conv, w.conv_bias, x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D,
                *tensors_of(w.out_proj), w.out_proj_bias,
            ]  # fmt: skip
            kept += fields
            table.append([address(t) for t in fields])
        addresses = torch.tensor(table, dtype=torch.int64, device=device)
        head, head_scales = tensors_of(weights.head)
        self.cycles = buffer(len(PARTS), dtype=torch.int32)
        operands = {
            "layers": addresses, "embeddings": weights.embeddings, "final_norm": weights.final_norm, "head": head,
            "head_scales": head_scales, "conv_states": conv_states, "ssm_states": ssm_states, "tokens": self.tokens,
            "position": self.position, "history": self.history, "logits": self.logits, "stream": stream,
            "squares": squares, "y": y, "sums": sums, "best": best, "counter": counter, "slot": self.slot,
            "cycles": self.cycles,
        }  # fmt: skip
        # The kernel has addresses only: these tensors must live as long as the step.
        self._kept = [*kept, *operands.values()]
        self._params = _Params(
            **{name: address(t) for name, t in operands.items()},
            eps_bits=struct.unpack("I", struct.pack("f", weights.eps))[0], capacity=self.history.shape[1],
        )  # fmt: skip
        if clock:
            plan["CLOCK"] = 7 % plan["GRID"]
        self._grid, self._threads, self._device = plan["GRID"], 32 * (plan["WARPS"] + 1), device
        self._kernel = _kernel(tuple(plan.items()), device.index)

    def __call__(self, choose: bool = False) -> Tensor:
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        self._params.choose = int(choose)
        self._kernel(self._grid, self._threads, stream, self._params)
        return self.logits
