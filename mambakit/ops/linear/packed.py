"""Packed weights: the formats, packing and unpacking.

Formats of a weight (out, in), named by their precision:

    "float32", "bfloat16"   the numbers themselves, (out, in)
    "int8"   int8 (out, in), and one float32 scale per `group` neighbours of a row: w = q * scale; `pack` makes q in
             [-127, 127], other quantisers' integers may be -128
    "int4"   int16 (out, padded / 4), and one float32 scale per `group`: w = q * scale, q in [-8, 7]. A block of 64
             columns is 16 words of 4 nibbles; nibble s of word i (bits 4s to 4s+3, two's complement) is column 16 s + i
             of the block, so that a register of words gives 16 neighbouring columns with one shift. Rows are padded
             with zeros to whole blocks and whole groups.
    scales   float32 (out, ceil(in / group)); for int4 those of the padding too
    "fp8"    uint8 (out, in), the bits of float8_e4m3fn, and one float32 scale per row, (out, 1): w = q * scale; `pack`
             makes |q| <= 448, and no NaN. `group` has no meaning for it
    "lossless32", "lossless16"   float32 in 28 bits and bfloat16 in 12, the same numbers to the last bit; `lossless.py`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops._backends.memory import zeros
from mambakit.ops.linear import lossless
from mambakit.quoting import brief

FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8", "lossless32", "lossless16")
SCALED = ("int8", "int4", "fp8")
FLOAT8, LARGEST_FLOAT8 = torch.float8_e4m3fn, 448.0
GROUP = 64  # numbers per scale: half a bit of scale per weight
GROUPS = (32, 64, 128)
BLOCK, WORDS = 64, 16


@dataclass(frozen=True)
class PackedWeight:
    """A weight (out, in) in one of `FORMATS`; this file's docstring says what ``data`` and ``scales`` hold."""

    format: str
    data: Tensor
    scales: Tensor | None
    in_features: int
    group: int = GROUP
    exceptions: tuple[Tensor, Tensor, Tensor] | None = None  # of the lossless formats: starts, columns, values

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"PackedWeight: format {brief(self.format)} is not known; choose one of {FORMATS}")
        if self.group not in GROUPS:
            raise ValueError(f"PackedWeight: group is {brief(self.group)}; choose one of {GROUPS}")
        if (self.scales is not None) != (self.format in SCALED):
            raise ValueError(f"PackedWeight: {', '.join(SCALED)} have scales, and only they; this is {self.format}")
        if (self.exceptions is not None) != (self.format in lossless.DTYPES):
            raise ValueError(
                f"PackedWeight: the lossless formats list exceptions, and only they; this is {self.format}"
            )

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def row_sizes(self) -> tuple[int, int]:
        """What a row has in ``data``, elements, and in ``scales``."""
        if self.format in lossless.DTYPES:
            return lossless.row_bytes(self.format, self.in_features), 0
        if self.format == "int8":
            return self.in_features, -(-self.in_features // self.group)
        if self.format == "fp8":
            return self.in_features, 1
        if self.format == "int4":
            columns = _padded(self.in_features, self.group)
            return columns // BLOCK * WORDS, columns // self.group
        return self.in_features, 0

    def tensors(self) -> dict[str, Tensor]:
        """What there is to store, by name."""
        tensors = {"data": self.data}
        if self.scales is not None:
            tensors["scales"] = self.scales
        if self.exceptions is not None:
            tensors |= zip(("starts", "columns", "values"), self.exceptions, strict=True)
        return tensors

    def dequantized(self) -> Tensor:
        """The weight (out, in) in float32."""
        return dequantize(self)


def pack(weight: Tensor, format: str, group: int = GROUP) -> PackedWeight:
    """Pack a weight (out, in) of any floating dtype.

    Args:
        format: one of `FORMATS`.
        group: numbers of a row that share a scale: 32, 64 or 128. Of int8 and int4 alone.

    Raises:
        ValueError: an unknown format or group, a weight that is not a matrix, one that is not finite (int8, int4, fp8),
            or one of another dtype than the format's (lossless32, lossless16).
    """
    if weight.dim() != 2:
        raise ValueError(f"pack: weight has shape {tuple(weight.shape)}, expected (out, in)")
    if format not in FORMATS:
        raise ValueError(f"pack: format {brief(format)} is not known; choose one of {FORMATS}")
    if group not in GROUPS:
        raise ValueError(f"pack: group is {brief(group)}; choose 32, 64 or 128")
    columns = weight.shape[1]
    weight = weight.detach()
    if format in ("float32", "bfloat16"):
        return PackedWeight(format, weight.to(getattr(torch, format)).contiguous(), None, columns, group)
    if format in lossless.DTYPES:
        if weight.dtype != lossless.DTYPES[format]:
            raise ValueError(
                f"pack: {format} holds {lossless.DTYPES[format]} and the weight is {weight.dtype}; cast it first"
            )
        data, exceptions = lossless.pack(weight, format)
        return PackedWeight(format, data, None, columns, group, exceptions)
    if not torch.isfinite(weight).all():
        raise ValueError(f"pack: the weight has numbers that are not finite, which {format} cannot hold")
    if format == "fp8":
        q, scales = to_float8(weight)
        return PackedWeight(format, q.view(torch.uint8), scales, columns, group)
    multiple = group if format == "int8" else max(BLOCK, group)
    padded = F.pad(weight.float(), (0, -columns % multiple)).unflatten(1, (-1, group))  # (out, groups, group)
    if format == "int8":
        scales = padded.abs().amax(-1) / 127
        q = torch.round(padded / _divisor(scales)).flatten(1)[:, :columns].to(torch.int8)
        return PackedWeight(format, q.contiguous(), scales, columns, group)
    # The number furthest from 0 becomes -8 exactly: the 16 levels are not symmetric, and this uses all of them.
    extreme = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = extreme / -8
    q = torch.round(padded / _divisor(scales)).clamp(-8, 7).flatten(1)
    return PackedWeight(format, _words_of(q), scales.contiguous(), columns, group)


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., k) as float8_e4m3fn and float32 scales (..., 1) of its rows: the largest number of a row is 448."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8
    q = (x / torch.where(scales == 0, 1.0, scales)).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8)
    return q.contiguous(), scales


def pack_integers(q: Tensor, scales: Tensor, format: str, group: int) -> PackedWeight:
    """The weight ``q * scales`` in int8 or int4: integers that another quantiser has rounded, exactly.

    Args:
        q: (out, in) int8; from -8 to 7 for int4.
        scales: (out, ceil(in / group)) float32.
        format: "int8" or "int4".

    Raises:
        ValueError: sizes that do not fit.
    """
    out, columns = q.shape
    if tuple(scales.shape) != (out, -(-columns // group)):
        raise ValueError(
            f"pack_integers: scales have shape {tuple(scales.shape)}; ({out}, {columns}) integers in groups of {group} "
            f"need {(out, -(-columns // group))}"
        )
    if format == "int8":
        return PackedWeight(format, q.contiguous(), scales.contiguous(), columns, group)
    padding = _padded(columns, group) - columns
    scales = F.pad(scales, (0, (columns + padding) // group - scales.shape[1]))
    return PackedWeight(format, _words_of(F.pad(q, (0, padding))), scales.contiguous(), columns, group)


def _words_of(q: Tensor) -> Tensor:
    """Integers (out, padded) from -8 to 7 as int16 words of four (out, padded / 4)."""
    nibbles = (q.to(torch.int32) & 15).unflatten(1, (-1, 4, WORDS))  # (out, blocks, s, word)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=q.device)[:, None]
    words = (nibbles << shifts).sum(2)  # (out, blocks, word), as unsigned 16-bit numbers
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).flatten(1).contiguous()


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)[..., None]


def _padded(in_features: int, group: int) -> int:
    """Columns of an int4 row with its padding: whole blocks and whole groups."""
    step = max(BLOCK, group)
    return -(-in_features // step) * step


def blank(
    format: str, out_features: int, in_features: int, group: int = GROUP, device: torch.device | str | None = None
) -> PackedWeight:
    """A weight of zeros in a packed format, for a checkpoint to fill; on torch's default device when None."""
    device = torch.get_default_device() if device is None else device
    scales = exceptions = None
    if format in lossless.DTYPES:
        data = zeros(out_features, lossless.row_bytes(format, in_features), dtype=torch.uint8, device=device)
        starts = zeros(out_features + 1, dtype=torch.int32, device=device)
        exceptions = (starts, zeros(0, dtype=torch.int32, device=device), zeros(0, dtype=torch.float32, device=device))
    elif format == "int8":
        data = zeros(out_features, in_features, dtype=torch.int8, device=device)
        scales = zeros(out_features, -(-in_features // group), dtype=torch.float32, device=device)
    elif format == "fp8":
        data = zeros(out_features, in_features, dtype=torch.uint8, device=device)
        scales = zeros(out_features, 1, dtype=torch.float32, device=device)
    else:
        columns = _padded(in_features, group)
        data = zeros(out_features, columns // BLOCK * WORDS, dtype=torch.int16, device=device)
        scales = zeros(out_features, columns // group, dtype=torch.float32, device=device)
    return PackedWeight(format, data, scales, in_features, group, exceptions)


def dequantize(weight: PackedWeight) -> Tensor:
    """The weight (out, in) in float32."""
    if weight.exceptions is not None:
        return lossless.unpack(weight.data, weight.exceptions, weight.format, weight.in_features)
    if weight.scales is None:
        return weight.data.float()
    if weight.format == "fp8":
        return weight.data.view(FLOAT8).float() * weight.scales
    if weight.format == "int4":
        words = weight.data.to(torch.int32).unflatten(1, (-1, 1, 16))  # (out, blocks, 1, word)
        shifts = torch.arange(28, 12, -4, dtype=torch.int32, device=words.device)[:, None]
        q = ((words << shifts) >> 28).flatten(1)  # (out, blocks, s, word): the sign comes with the shift to the right
    else:
        q = weight.data
    scales = weight.scales.repeat_interleave(weight.group, 1)
    return q[:, : weight.in_features].float() * scales[:, : weight.in_features]
