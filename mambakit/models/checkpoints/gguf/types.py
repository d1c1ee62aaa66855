"""ggml's types of tensors: which are read and written, and what a block of each takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockType:
    """How a tensor's numbers are stored.

    Attributes:
        number: in files.
        name: ggml's.
        numbers: of a row that make a block; 1 for plain numbers.
        bytes: of a block.
        dtype: of plain numbers, else None.
    """

    number: int
    name: str
    numbers: int
    bytes: int
    dtype: torch.dtype | None = None


F32 = BlockType(0, "F32", 1, 4, torch.float32)
F16 = BlockType(1, "F16", 1, 2, torch.float16)
BF16 = BlockType(30, "BF16", 1, 2, torch.bfloat16)
F64 = BlockType(28, "F64", 1, 8, torch.float64)
Q4_0 = BlockType(2, "Q4_0", 32, 18)
Q4_1 = BlockType(3, "Q4_1", 32, 20)
Q5_0 = BlockType(6, "Q5_0", 32, 22)
Q5_1 = BlockType(7, "Q5_1", 32, 24)
Q8_0 = BlockType(8, "Q8_0", 32, 34)
Q4_K = BlockType(12, "Q4_K", 256, 144)
Q5_K = BlockType(13, "Q5_K", 256, 176)
Q6_K = BlockType(14, "Q6_K", 256, 210)

_READ = {t.number: t for t in (F32, F16, BF16, F64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)}
# Types that mambakit writes -> llama.cpp's number of a file of them (general.file_type).
WRITTEN = {"F32": (F32, 0), "F16": (F16, 1), "BF16": (BF16, 32), "Q8_0": (Q8_0, 7), "Q4_0": (Q4_0, 2)}


def block_type(number: int) -> BlockType | None:
    """The type of this number; None where it is not read."""
    return _READ.get(number)


def named() -> str:
    """The names of the types that are read, for errors."""
    return ", ".join(t.name for t in _READ.values())
