"""float32 in 28 bits and bfloat16 in 12, without loss: packing and unpacking.

The numbers of a row of weights differ little in size. A number's highest byte (its sign and seven bits of its exponent)
takes few values, so it is stored as four bits: the sign, and which of seven neighbouring values the seven bits have (14
octaves, the largest number of the row among them), or that they are 0. The other bytes are stored as they are. What is
smaller than those octaves is kept in a list (about one weight in 2,500 of a normal distribution).

``data`` is uint8 (out, 16 + blocks * B), B = 96 for bfloat16 and 224 for float32; a block is 64 columns, the last one
padded with 0:

    16 bytes          the row's table: the highest byte for each of the 16 nibbles
    of each block:
    32 bytes          nibbles; the low one of byte i is of column order(i), the high one of column 32 + order(i)
    64 bytes          the second bytes, of columns order(0) ... order(31), 32 + order(0) ...
    128 bytes         float32 alone: the lower 16 bits, in that order with 8 and 8 of the sixteens swapped in the middle

order(i) = 8 (k // 4) + 4 (i // 16) + k % 4 with k = i % 16: interleaving bytes, then 16-bit halves, within 128 bits
then leaves the columns as they come. Listed weights are (row, column, value), as ``starts`` (out + 1,) int32,
``columns`` int32 and ``values`` float32; in ``data`` they are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, TABLE = 64, 16
BLOCK_BYTES = {"lossless32": 224, "lossless16": 96}
DTYPES = {"lossless32": torch.float32, "lossless16": torch.bfloat16}
_ROWS = 4096  # packed at a time: a bound on the memory that packing takes


def _orders(device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of a half block (32): in the order of the bytes, and in that of the lower 16 bits."""
    i = torch.arange(32, dtype=torch.int64, device=device)
    k = i % 16
    order = 8 * (k // 4) + 4 * (i // 16) + k % 4
    halves = 16 * ((i % 16) // 8) + 8 * (i // 16) + i % 8  # where byte i's number has its lower bits
    lower = torch.empty_like(order)
    lower[halves] = order
    return order, lower


def row_bytes(format: str, in_features: int) -> int:
    return TABLE + -(-in_features // BLOCK) * BLOCK_BYTES[format]


def pack(weight: Tensor, format: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``data`` and the list of a weight (out, in) of the format's dtype."""
    data, listed = [], []
    for first in range(0, weight.shape[0], _ROWS):
        part, rows, columns, values = _pack_rows(weight[first : first + _ROWS], format)
        data.append(part)
        listed.append((rows + first, columns, values))
    rows, columns, values = (torch.cat(parts) for parts in zip(*listed, strict=True))
    starts = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = torch.bincount(rows, minlength=weight.shape[0]).cumsum(0)
    return torch.cat(data), (starts, columns.to(torch.int32), values.float())


def _pack_rows(weight: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = format == "lossless32"
    bits = weight.contiguous().view(torch.int32 if wide else torch.int16).to(torch.int32)
    if not wide:
        bits = bits << 16
    top = (bits >> 24) & 0x7F
    base = (top.amax(1, keepdim=True) - 7).clamp(min=0)  # (out, 1)
    code = (top - base).clamp(min=0)
    listed = (top > 0) & (code == 0)
    rows, columns = listed.nonzero(as_tuple=True)
    values = weight[rows, columns]
    bits = bits.masked_fill(listed, 0)
    code = code | ((bits >> 28) & 8)
    entries = torch.arange(8, device=weight.device, dtype=torch.int32)
    table = torch.where(entries > 0, base + entries, 0)
    table = torch.cat([table, table | 0x80], 1)  # (out, 16)

    padding = -weight.shape[1] % BLOCK
    bits, code = (F.pad(t, (0, padding)).unflatten(1, (-1, 2, 32)) for t in (bits, code))  # (out, blocks, half, 32)
    order, lower = _orders(weight.device)
    code = code[..., order]
    parts = [code[:, :, 0] | code[:, :, 1] << 4, ((bits >> 16) & 0xFF)[..., order].flatten(2)]
    if wide:
        low = (bits & 0xFFFF)[..., lower]
        parts.append(torch.stack([low & 0xFF, low >> 8], -1).flatten(2))  # little endian
    blocks = torch.cat(parts, 2).flatten(1)
    return torch.cat([table, blocks], 1).to(torch.uint8), rows, columns, values


def unpack(data: Tensor, exceptions: tuple[Tensor, Tensor, Tensor], format: str, in_features: int) -> Tensor:
    """The weight (out, in), in float32."""
    wide = format == "lossless32"
    table, blocks = data[:, :TABLE], data[:, TABLE:].unflatten(1, (-1, BLOCK_BYTES[format]))  # (out, blocks, B)
    order, lower = _orders(data.device)
    pairs = blocks[:, :, :32].long()
    nibbles = torch.stack([pairs & 15, pairs >> 4], 2)  # (out, blocks, half, 32)
    top = table.gather(1, nibbles.flatten(1)).view(nibbles.shape).to(torch.int32)
    middle = blocks[:, :, 32:96].unflatten(2, (2, 32)).to(torch.int32)
    bits = torch.empty_like(top)
    bits[..., order] = top << 24 | middle << 16
    if wide:
        low = blocks[:, :, 96:].unflatten(2, (2, 32, 2)).to(torch.int32)
        bits[..., lower] |= low[..., 0] | low[..., 1] << 8
    weight = bits.flatten(1)[:, :in_features].contiguous().view(torch.float32)
    starts, columns, values = exceptions
    rows = torch.repeat_interleave(
        torch.arange(len(starts) - 1, dtype=torch.int64, device=data.device), starts.diff().long(),
        output_size=len(columns),  # known: a device need not be asked, nor a CUDA graph's capture end
    )  # fmt: skip
    weight[rows, columns.long()] = values
    return weight
