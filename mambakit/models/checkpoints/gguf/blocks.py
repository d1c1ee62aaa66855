"""Blocks of numbers: from bytes to float32, from bytes to packed weights exactly, and from numbers to bytes.

A block is a few scales and the numbers' integers; `ggml-quants.c` of llama.cpp defines them. Q8_0 and Q4_0 are the
packed formats int8 and int4 with groups of 32, in another order: ``w = q * scale``, the scale in float16. The K types
have 256 numbers with scales of 6 or 8 bits under one or two float16 ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambakit.models.checkpoints.gguf.types import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockType,
)
from mambakit.ops.linear.packed import PackedWeight, pack_integers

PACKED = {Q8_0: "int8", Q4_0: "int4"}
"""Types whose weights run as they are -> the packed format; groups have 32 numbers."""
GROUP = 32


# -- from bytes --------------------------------------------------------------------------------------------------------


def numbers_of(raw: Tensor, type: BlockType, shape: tuple[int, ...]) -> Tensor:
    """The tensor that ``raw`` (nbytes,) uint8 holds: its own dtype where it is plain, else float32."""
    if type.dtype is not None:
        return raw.view(type.dtype).view(shape)
    return _READERS[type](raw.view(-1, type.bytes)).view(shape)


def packed_of(raw: Tensor, type: BlockType, shape: tuple[int, ...]) -> PackedWeight:
    """The weight (out, in) of a type of `PACKED`, exactly."""
    out, columns = shape
    blocks = raw.view(-1, type.bytes)
    scales = _float16(blocks, 0).view(out, columns // GROUP)
    q = (_bytes8 if type is Q8_0 else _nibbles4)(blocks).view(out, columns)
    return pack_integers(q, scales, PACKED[type], GROUP)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """(blocks, 1) float32: the float16 at byte ``at`` of each block."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _halves(q: Tensor) -> Tensor:
    """Lower nibbles, then upper ones: (..., bytes) -> (..., 2 bytes)."""
    return torch.cat([q & 15, q >> 4], -1)


def _bytes8(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8)


def _nibbles4(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 2:]).to(torch.int8) - 8


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """(blocks, 32) uint8: bit i of the 32-bit number at byte ``at``, as 16 or 0."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, at : at + 4, None] >> bits) & 1).flatten(1) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return _bytes8(blocks).float() * _float16(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles4(blocks).float() * _float16(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 4:]).float() * _float16(blocks, 0) + _float16(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _halves(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (q.float() - 16) * _float16(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return q.float() * _float16(blocks, 0) + _float16(blocks, 2)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: (blocks, 8, 1) factors and subtrahends of each 32 numbers.

    The 12 bytes from 4 hold 8 scales and 8 minima of 6 bits: the first four of each in the lower bits of bytes 0 to 3
    and 4 to 7, the last four in the nibbles of bytes 8 to 11 under the two upper bits of bytes 0 to 7.
    """
    first, second, third = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, third & 15 | (first >> 6) << 4], 1)
    minima = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], 1)
    factors = _float16(blocks, 0) * scales.float()
    return factors[..., None], (_float16(blocks, 2) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    factors, minima = _scales_and_minima(blocks)
    q = _halves(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32)
    return q.float() * factors - minima


def _q5_k(blocks: Tensor) -> Tensor:
    factors, minima = _scales_and_minima(blocks)
    q = _halves(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = ((blocks[:, 16:48, None].transpose(1, 2) >> bits) & 1) << 4  # bit i of byte j is number j of 32 numbers i
    return (q | fifth).float() * factors - minima


def _q6_k(blocks: Tensor) -> Tensor:
    low = _halves(blocks[:, :128].unflatten(1, (2, 1, 64)))  # (blocks, half, 1, 128): 64 lower nibbles, 64 upper ones
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> pairs) & 3  # (blocks, half, 4, 32)
    q = (low.view(-1, 2, 4, 32) | high << 4).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _float16(blocks, 208)  # of each 16 numbers
    return q.float().view(-1, 16, 16) * scales[..., None]


_READERS: dict[BlockType, Callable[[Tensor], Tensor]] = {
    Q8_0: _q8_0, Q4_0: _q4_0, Q4_1: _q4_1, Q5_0: _q5_0, Q5_1: _q5_1, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k,
}  # fmt: skip


# -- to bytes ----------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor, type: BlockType) -> bytes:
    """The tensor's numbers in blocks of a type that is written; as llama.cpp's own quantiser rounds them."""
    if type.dtype is not None:
        return tensor.to(type.dtype).reshape(-1).view(torch.uint8).numpy().tobytes()
    groups = tensor.float().reshape(-1, GROUP)
    if type is Q8_0:
        scales = groups.abs().amax(1, keepdim=True) / 127
        q = _away_from_zero(groups * _inverse(scales)).to(torch.int8).view(torch.uint8)
    else:
        # The number furthest from 0 becomes -8, and 8.5 is added before the fraction is cut off.
        scales = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
        q = (groups * _inverse(scales) + 8.5).to(torch.uint8).clamp(max=15)
        q = q[:, :16] | q[:, 16:] << 4
    return torch.cat([scales.half().view(torch.uint8), q], 1).numpy().tobytes()


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def _away_from_zero(x: Tensor) -> Tensor:
    """Rounded to the nearest integer, halves away from zero: C's roundf."""
    whole = torch.trunc(x)
    return torch.where((x - whole).abs() >= 0.5, whole + torch.sign(x), whole)


def fits(tensor: Tensor, type: BlockType) -> bool:
    """Whether rows of the tensor are whole blocks of the type."""
    return tensor.shape[-1] % type.numbers == 0
