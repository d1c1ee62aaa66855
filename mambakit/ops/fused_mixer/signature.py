"""What a plan of a whole Mamba layer depends on, and which calls have one."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops._backends import nvrtc
from mambakit.ops.linear.triton_plan import FLOAT8_CAPABILITY, takes_float8
from mambakit.ops.selective_scan import cuda_launch
from mambakit.ops.selective_scan.plan import backward_plan


class LayerWeights(NamedTuple):
    """A layer's parameters: (h,), (2 d, h), (2 d,), (d, 1, k) or (d, k), (d,), (r + 2 n, d), (d, r), (d,), (d, n),
    (d,), (h, d), (h,), and of the norms of dt, B and C (r,), (n,), (n,).

    Without in_proj (and norm) the layer begins with its output, without out_proj it ends with its input. A_log is
    log(-A), or A itself (`Signature.log`). The norms of dt, B and C are there where `Signature.mixer_eps` is one, and
    all three have weights or none has.
    """

    norm: Tensor | None
    in_proj: Tensor | None
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor | None
    out_bias: Tensor | None
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None


class PackedKind(NamedTuple):
    """How a weight is packed (`mambakit.ops.linear`): its format, columns, and numbers that share a scale."""

    format: str
    in_features: int
    group: int


# The weights that may be packed: a `LayerWeights` then has their packed numbers.
PACKABLE = ("in_proj", "x_proj", "out_proj")


class PackedParts(NamedTuple):
    """Of the weights of `PACKABLE`: how each is packed, and its scales; None where one is plain or absent."""

    kinds: tuple[PackedKind | None, ...]
    scales: tuple[Tensor | None, ...]


class Kinds:
    """Dtype and shape of each of a layer's weights, None where there is none. Equal ones are one object (`kinds_of`),
    so that a signature is found without looking at them."""

    def __init__(self, each: tuple[tuple[torch.dtype, torch.Size] | None, ...]):
        self.each = each


kinds_of = functools.cache(Kinds)


class Signature(NamedTuple):
    """What a plan depends on."""

    shape: torch.Size  # (b, l, h), or (b, l, 2 d) without in_proj
    x: torch.dtype
    residual: torch.dtype | None  # None: the layer is the first one, or without its norm
    kept: torch.dtype  # of the residual stream
    dtype: torch.dtype  # that the layer computes in
    weights: Kinds
    eps: float
    device: torch.device
    gradient: bool
    # Dtype and shape of the states (convolution, scan) that are updated in place; None: rows begin from zeros.
    log: bool  # A_log is log(-A)
    states: tuple[tuple[torch.dtype, torch.Size], tuple[torch.dtype, torch.Size]] | None
    mixer_eps: float | None = None  # of the norms of dt, B and C; None: there are none
    packed: tuple[PackedKind | None, ...] | None = None  # of `PACKABLE`; None: every weight is plain
    padded: bool = False  # rows have padding on the left; then there are states

    def kinds(self) -> dict[str, Any]:
        """Dtype and shape of each weight by its name, None where there is none; of a packed one as it is widened."""
        found: dict[str, Any] = dict(zip(LayerWeights._fields, self.weights.each, strict=True))
        for name, kind in self.packed_kinds().items():
            found[name] = self.dtype, torch.Size((found[name][1][0], kind.in_features))
        return found

    def packed_kinds(self) -> dict[str, PackedKind]:
        """How weights are packed, by the names of those that are."""
        return {name: kind for name, kind in zip(PACKABLE, self.packed or (), strict=self.packed is not None) if kind}

    def tile_of(self, name: str) -> Any:
        """The tile of a packed weight's product that widens in registers; None where another way serves."""
        from mambakit.ops.linear.triton import tile_of_call  # needs Triton

        stored: Any = self.weights.each[LayerWeights._fields.index(name)]
        row_bytes = stored[1][1] * stored[0].itemsize
        packed, out_features = self.packed_kinds()[name], stored[1][0]
        return tile_of_call(self.device, self.dtype, self.rows(), out_features, *packed, row_bytes)

    def in_float8(self, name: str) -> bool:
        """Whether the product of a packed weight takes rows in float8."""
        n, k = self.kinds()[name][1]
        fp8 = self.packed_kinds()[name].format == "fp8"
        return fp8 and takes_float8(self.dtype, self.rows(), n, k) and self.tile_of(name) is None

    def rows(self) -> int:
        return self.shape[0] * self.shape[1]


_FLOAT32 = ("dt_bias", "A_log", "D")
ALIGNED = 16  # bytes that the kernels read at once


@functools.cache
def unavailable() -> str | None:
    """Why no layer can run as a plan on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return nvrtc.available()


def unserved(signature: Signature) -> str | None:
    """Why no plan serves a signature, or None; the op `mambakit::fused_mixer` serves it."""
    s = signature
    kinds = s.kinds()
    if s.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"layers that compute in {s.dtype} run op by op"
    for name, kind in kinds.items():
        if kind is None:
            continue
        allowed = (torch.float32,) if name in _FLOAT32 else (torch.float32, s.dtype)
        if kind[0] not in allowed:
            return f"{name} is {kind[0]}"
    fault = _shapes(s, kinds)
    if fault is not None:
        return fault
    (d, n), conv = kinds["A_log"][1], kinds["conv"]
    if not 0 < n <= 256 or d == 0 or 0 in s.shape:
        return "a layer without elements, or with more than 256 states"
    if d * s.dtype.itemsize % ALIGNED or s.shape[-1] * s.dtype.itemsize % ALIGNED:
        return f"rows of {d} channels or of {s.shape[2]} do not begin at multiples of {ALIGNED} bytes"
    if not 2 <= conv[1][-1] <= 8:
        return f"a filter of {conv[1][-1]} taps"
    if s.residual not in (None, s.kept):
        return f"the residual stream changes from {s.residual} to {s.kept}"
    if s.packed is not None and (fault := _packed_otherwise(s, kinds)) is not None:
        return fault
    return unavailable() or (_too_large(s, d, n) if s.gradient else None)


def _shapes(s: Signature, kinds: dict[str, Any]) -> str | None:
    """Which tensor's shape does not fit the others', or None. The modules' own calls raise for it."""
    filter_ = kinds["conv"][1]
    two = [len(kinds[name][1]) == 2 for name in ("A_log", "dt_proj", "out_proj") if kinds[name] is not None]
    if len(s.shape) != 3 or not all(two) or len(filter_) not in (2, 3):
        return "a tensor of another number of dimensions"
    if kinds["in_proj"] is None and (kinds["norm"] is not None or kinds["in_bias"] is not None):
        return "a norm, or in_proj's bias, without in_proj"
    if kinds["out_proj"] is None and kinds["out_bias"] is not None:
        return "out_proj's bias without out_proj"
    (b, _, h), (d, n), r, k = s.shape, kinds["A_log"][1], kinds["dt_proj"][1][1], filter_[-1]
    if kinds["in_proj"] is None and h != 2 * d:
        return f"{h} channels, where in_proj gives {2 * d}"
    out = h if kinds["out_proj"] is None or kinds["norm"] is not None else kinds["out_proj"][1][0]
    expected: list[tuple[int, ...]] = [
        (h,), (2 * d, h), (2 * d,), (d, 1, k) if len(filter_) == 3 else (d, k), (d,), (r + 2 * n, d), (d, r), (d,),
        (d, n), (d,), (out, d), (out,), (r,), (n,), (n,),
    ]  # fmt: skip
    weighted = [kinds[name] is not None for name in ("dt_norm", "B_norm", "C_norm")]
    if any(weighted) and not (all(weighted) and s.mixer_eps is not None):
        return "weights of some of the norms of dt, B and C, or without their epsilon"
    for (name, kind), shape in zip(kinds.items(), expected, strict=True):
        if kind is not None and tuple(kind[1]) != shape:
            return f"{name} has shape {tuple(kind[1])}"
    if s.states is not None:
        (dtype, conv), (wide, ssm) = s.states
        fits = tuple(conv[1:]) == (d, k - 1) and tuple(ssm[1:]) == (d, n) and min(conv[0], ssm[0]) >= b
        if not fits or wide != torch.float32 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"states of {dtype} {tuple(conv)} and {wide} {tuple(ssm)}"
        if s.padded and dtype != s.dtype:
            return f"padding before a window of {dtype} in a layer that computes in {s.dtype}"
    return None


def _packed_otherwise(s: Signature, kinds: dict[str, Any]) -> str | None:
    """Why a layer's packed weights take another way than a plan's, or None."""
    if s.gradient:
        return "packed weights have no gradient"
    if unavailable() is not None:
        return None
    from mambakit.ops.linear.prepared import DATA  # needs Triton
    from mambakit.ops.linear.triton import card_at

    stored: dict[str, Any] = dict(zip(LayerWeights._fields, s.weights.each, strict=True))
    for name, kind in s.packed_kinds().items():
        if DATA.get(kind.format) != stored[name][0]:
            return f"{name} is packed as {kind.format}"
        if kind.format == "fp8" and card_at(s.device)[2] < FLOAT8_CAPABILITY:
            return "a GPU without 8-bit floats"
        bias = kinds.get(name.replace("proj", "bias"))
        if s.in_float8(name) and (s.dtype != torch.bfloat16 or bias is not None):
            return f"a float8 product in {s.dtype}, or with a bias"
    return None


def _too_large(s: Signature, d: int, n: int) -> str | None:
    shared, multiprocessors = nvrtc.shared_memory(s.device.index), cuda_launch.multiprocessors(s.device.index)
    needed = backward_plan(*s.shape[:2], d, n, multiprocessors, shared).backward_bytes
    return f"the gradient of {n} states takes {needed} bytes of shared memory of {shared}" if needed > shared else None
