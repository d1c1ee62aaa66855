"""The plan of the persistent decode step: whether it serves a model, what it is compiled with, and its shared memory.

The layout of shared memory is defined here alone; `persistent.cu` takes its offsets and strides as macros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.ops._backends.memory import all_plain
from mambakit.ops.decode.weights import ModelWeights, shape_of, tensors_of

MOST_ROWS = 8
STATE_SIZE = 16
_FIELDS, _SLICES = (14, 14, 17), 8  # FIELDS by NORMS and SLICES of persistent.cu
_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
_K_TILE = {0: 64, 8: 128, 4: 256}  # columns of a weight tile, by BITS


@dataclass(frozen=True)
class PersistentPlan:
    """What one launch of the kernel needs. ``macros`` are explained in `persistent.cu`."""

    macros: dict[str, int]

    @property
    def grid(self) -> int:
        return self.macros["GRID"]

    @property
    def threads(self) -> int:
        return 32 * (self.macros["WARPS"] + 1)  # and the producer warp

    @property
    def shared_bytes(self) -> int:
        return self.macros["SHARED"]


def _lines(size: int) -> int:
    """Whole lines of 128 bytes."""
    return -(-size // 128) * 128


def _shared_memory(
    grid: int, rows: int, h: int, d: int, v: int, rank: int, layers: int, scan_bytes: int, buffers: int, warps: int,
    norms: int,
) -> dict[str, int]:  # fmt: skip
    """Offsets and strides of the shared memory: AT_RING, the last offset, is the size of all but the ring."""
    channels, stream, logits = (-(-size // grid) for size in (d, h, v))
    runs = 4 + 2 * -(-logits // (16 * warps)) + 1
    padded = -(-channels // 16) * 16
    # A CTA's channels start at a multiple of 8. Strides are padded so that neighbouring rows have no bank conflicts.
    x_columns, r = -(-(channels + 7) // 16) * 16, rank + 2 * STATE_SIZE
    macros = {
        "ACT_ROW": max(h, d) * 2 + 64, "X_COLUMNS": x_columns, "X_ROW": x_columns * 2 + 16,  # bytes, columns, bytes
        "U_ROW": x_columns + 8, "DT_ROW": rank + 8,  # elements
    }  # fmt: skip
    # Small weights: x_proj's columns, then dt_proj's rows and A_log's of the CTA's channels, then those of the norms of
    # dt, B and C.
    macros["SMALL_DT"] = _lines(r * macros["X_ROW"])
    macros["SMALL_A"] = macros["SMALL_DT"] + _lines(padded * rank * 2)
    macros["SMALL_NORM"] = macros["SMALL_A"] + _lines(channels * STATE_SIZE * scan_bytes)
    macros["SMALL"] = macros["SMALL_NORM"] + (_lines(r * 2) if norms == 2 else 0)
    sections = {
        "TABLE": (layers + 1) * _FIELDS[norms] * 8,  # addresses of weights
        "RUNS": warps * runs * 32,
        "ACT": rows * macros["ACT_ROW"],  # the input of a product
        "PART": warps * 2 * 16 * 8 * 4,  # sums of two row tiles for each warp
        "SMALL": buffers * macros["SMALL"],
        "U": 8 * macros["U_ROW"] * 2,
        "Z": rows * channels * 4,
        "DELTA": padded * 8 * 4,
        "DT": 8 * macros["DT_ROW"] * 2,
        "BC": rows * 2 * STATE_SIZE * 4,
        "RESIDUAL": stream * rows * 4,
        "SQUARES": rows * _SLICES * 4,
        "INV_RMS": rows * 8,
        "BEST": rows * 8,
        "REACHED": 4,
        "RING": 0,
    }
    offset = 0
    for name, size in sections.items():
        macros[f"AT_{name}"] = offset
        offset += _lines(size)
    return macros


def _queue(bits: int, rows: int, k_tiles: int) -> tuple[int, int, int]:
    """(stages of a warp's ring, those refilled at once at the end of a phase, cycles between refills of the others).

    ``k_tiles`` are a warp's of a layer. Measured on an H100. A deep queue of weights keeps memory busy, and delays the
    values that CTAs exchange: small and packed models are bound by the latter.
    """
    if bits or k_tiles <= 12:
        return 4, 4, 0
    return (8, 4, 1000) if rows <= 4 else (3, 3, 0)


def _unsupported_tensors(weights: ModelWeights, dtype: torch.dtype, scan_dtype: torch.dtype) -> str | None:
    """Why the kernel cannot read these tensors, or None."""
    for w in weights.layers:
        plain = [w.norm, w.conv, w.dt_proj, w.in_proj_bias, w.conv_bias, w.out_proj_bias, *w.norms()]
        large = [t for t in (w.in_proj, w.x_proj, w.out_proj) if isinstance(t, Tensor)]
        scan = [w.A_log, w.D, w.dt_bias]
        same = all(t is None or t.dtype == dtype for t in (*plain, *large)) and all(t.dtype == scan_dtype for t in scan)
        every = [t for weight in (w.in_proj, w.x_proj, w.out_proj) for t in tensors_of(weight)] + plain + scan
        if not same or not all_plain(every) or any(t is not None and not t.is_contiguous() for t in every):
            return "layers of other dtypes, or weights that are no plain contiguous tensors"
        if any(
            t.data_ptr() % 16
            for t in (w.in_proj, w.x_proj, w.out_proj, w.dt_proj, w.A_log, *w.norms())
            if isinstance(t, Tensor)
        ):
            return "weights that are not aligned to 16 bytes"
    ends = [weights.embeddings, weights.final_norm, *tensors_of(weights.head)]
    if not all_plain(ends) or any(t is not None and not t.is_contiguous() for t in ends):
        return "embeddings, a last norm or a head that are no plain contiguous tensors"
    return None


def plan_of(
    weights: ModelWeights,
    rows: int,
    conv_dtype: torch.dtype,
    limits: tuple[int, int],
    warps: int | None = None,
    queue: tuple[int, int, int] | None = None,
    verify: bool = False,
) -> PersistentPlan | str:
    """The plan, or why the kernel cannot serve.

    Args:
        rows: of the batch, or with ``verify`` the tokens to verify.
        limits: multiprocessors of the card, and bytes of shared memory of a CTA.
        warps, queue: replace what is chosen here: compute warps, and what `_queue` returns.
        verify: for draft verification.
    """
    if not 1 <= rows <= MOST_ROWS:
        return f"{rows} rows; it serves 1 to {MOST_ROWS}"
    layers, dtype = weights.layers, weights.final_norm.dtype
    if not layers:
        return "no layers"
    (bits, group), norms = weights.kind or (0, 0), weights.norms
    if float8 := bits == 1:
        bits, group = 8, 128  # tiles as int8's; the group is not read
    first = layers[0]
    (v, h), (_, d) = shape_of(weights.head), shape_of(first.x_proj)
    rank, n, width = first.dt_proj.shape[1], first.A_log.shape[1], first.conv.shape[1]
    grid, shared = limits
    k_tile = _K_TILE[bits]
    channels, stream = -(-d // grid), -(-h // grid)
    if dtype not in _DTYPES:
        return f"{dtype} weights; it serves {', '.join(map(str, _DTYPES))}"
    if grid > 255:
        return f"{grid} multiprocessors; a byte counts them"
    shaped = n == STATE_SIZE and 2 <= width <= 8 and not (rank % 16 or h % k_tile or d % k_tile)
    if not shaped or min(v, d, h) < grid:
        return f"shape h={h}, d={d}, n={n}, rank={rank}, width={width}, v={v}"
    c_tiles, s_tiles = -(-channels // 16), -(-stream // 16)
    # 8 warps were faster than 16 on an H100; a warp has at most two row tiles of a phase. Not chosen by the number of
    # rows: the order of sums, and so a row's bits, depend on the number of warps.
    warps = next((w for w in ([warps] if warps else (8, 16)) if max(2 * c_tiles, s_tiles, rows) <= w), None)
    if warps is None:
        return f"{channels} channels and {stream} rows of the stream for each of {grid} blocks"
    scan_dtype = first.A_log.dtype
    if conv_dtype not in (dtype, torch.float32) or scan_dtype not in (dtype, torch.float32):
        return f"states of {conv_dtype} or A_log of {scan_dtype} with weights of {dtype}"
    unsupported = _unsupported_tensors(weights, dtype, scan_dtype)
    if unsupported is not None:
        return unsupported
    most, at_once, pace = queue or _queue(bits, rows, (2 * c_tiles * h + s_tiles * d) // k_tile // warps)
    stage_bytes = 2048 + (512 if bits and not float8 else 0)  # 16 rows of 128 bytes, and of 32 bytes of scales
    for buffers in (2, 1):
        memory = _shared_memory(grid, rows, h, d, v, rank, len(layers), first.A_log.itemsize, buffers, warps, norms)
        fixed = memory["AT_RING"]
        stages = min(most, (shared - fixed) // (warps * stage_bytes))
        if stages >= 2:
            break
    if stages < 1:
        return f"{fixed} bytes of shared memory beside the weights' ring, of {shared}"
    return PersistentPlan({
        "WARPS": warps, "DTYPE": _DTYPES[dtype], "BITS": bits, "GROUP": group,
        "FLOAT8": int(float8), "ROWS": rows, "GRID": grid, "H": h,
        "D": d, "RANK": rank, "WIDTH": width, "VOCABULARY": v, "LAYERS": len(layers),
        "SCAN_FLOAT": int(scan_dtype == torch.float32), "CONV_FLOAT": int(conv_dtype == torch.float32),
        "VERIFY": int(verify), "NORMS": norms, "STAGES": stages, "STAGE_BYTES": stage_bytes,
        "DEFER": max(0, stages - at_once), "PACE": pace, "BUFFERS": buffers,
        "SHARED": fixed + warps * stages * stage_bytes, **memory,
    })  # fmt: skip
