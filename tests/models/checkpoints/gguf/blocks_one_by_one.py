"""ggml's blocks read number by number, in Python's own arithmetic: the oracle of the tests."""

from __future__ import annotations

import struct


def _half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def _nibble(block: bytes, at: int, i: int) -> int:
    """Number i of 32 in 16 bytes: lower nibbles first."""
    return block[at + i % 16] >> 4 * (i // 16) & 15


def _bit(block: bytes, at: int, i: int) -> int:
    return block[at + i // 8] >> i % 8 & 1


def _six_bits(block: bytes, i: int) -> tuple[int, int]:
    """(scale, minimum) i of 8 of a Q4_K or Q5_K block."""
    q = block[4:16]
    if i < 4:
        return q[i] & 63, q[i + 4] & 63
    return q[i + 4] & 15 | q[i - 4] >> 6 << 4, q[i + 4] >> 4 | q[i] >> 6 << 4


def _q4_k(block: bytes, i: int) -> float:
    scale, minimum = _six_bits(block, i // 32)
    q = block[16 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
    return _half(block, 0) * scale * q - _half(block, 2) * minimum


def _q5_k(block: bytes, i: int) -> float:
    scale, minimum = _six_bits(block, i // 32)
    q = block[48 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
    q |= (block[16 + i % 32] >> i // 32 & 1) << 4
    return _half(block, 0) * scale * q - _half(block, 2) * minimum


def _q6_k(block: bytes, i: int) -> float:
    half, within = divmod(i, 128)
    quarter, place = divmod(within, 32)
    low = block[64 * half + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
    high = block[128 + 32 * half + place] >> 2 * quarter & 3
    scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
    return _half(block, 208) * scale * ((low | high << 4) - 32)


NUMBER = {
    "Q8_0": lambda b, i: _half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0],
    "Q4_0": lambda b, i: _half(b, 0) * (_nibble(b, 2, i) - 8),
    "Q4_1": lambda b, i: _half(b, 0) * _nibble(b, 4, i) + _half(b, 2),
    "Q5_0": lambda b, i: _half(b, 0) * ((_nibble(b, 6, i) | _bit(b, 2, i) << 4) - 16),
    "Q5_1": lambda b, i: _half(b, 0) * (_nibble(b, 8, i) | _bit(b, 4, i) << 4) + _half(b, 2),
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
# Where a block of each type has its float16 numbers.
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip


def numbers(name: str, raw: bytes, block_bytes: int, block_numbers: int) -> list[float]:
    blocks = [raw[at : at + block_bytes] for at in range(0, len(raw), block_bytes)]
    return [NUMBER[name](block, i) for block in blocks for i in range(block_numbers)]
