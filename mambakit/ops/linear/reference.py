"""A linear layer with a packed weight in float64, the weight read column by column: the oracle of the tests.

The formats are those of `api.py` and `lossless.py`, read here as these files describe them and by no code of theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x, weight, bias=None, *, x_in_16_bits=False):
    """``x @ weight.T + bias``, float64.

    Args:
        x_in_16_bits: take x as the CPU kernels of int8 and int4 weights do, rounded to 16 bits (`in_16_bits`).
    """
    x = in_16_bits(x, weight.group) if x_in_16_bits and weight.format in ("int8", "int4") else x.double()
    y = x @ numbers(weight).T
    return y if bias is None else y + bias.double()


def numbers(weight) -> Tensor:
    """The weight (out, in) in float64, exactly the numbers that the packed bits stand for."""
    read = {"int8": _int8, "int4": _int4, "fp8": _fp8, "lossless32": _lossless, "lossless16": _lossless}.get(
        weight.format
    )
    if read is None:  # float32, bfloat16
        return weight.data.double()
    return torch.stack([read(weight, column) for column in range(weight.in_features)], 1)


def in_16_bits(x: Tensor, group: int) -> Tensor:
    """x (..., in), float64, as integers up to 32767 times one scale for every ``group`` neighbours."""
    columns = x.shape[-1]
    padded = F.pad(x.double(), (0, -columns % group)).unflatten(-1, (-1, group))
    scales = padded.abs().amax(-1, keepdim=True) / 32767
    return (torch.round(padded / scales.where(scales > 0, 1)) * scales).flatten(-2)[..., :columns]


def _int8(weight, column: int) -> Tensor:
    return weight.data[:, column].double() * weight.scales[:, column // weight.group].double()


def _int4(weight, column: int) -> Tensor:
    block, within = divmod(column, 64)
    nibble, word = divmod(within, 16)
    q = (weight.data[:, 16 * block + word].int() >> 4 * nibble) & 15
    return torch.where(q >= 8, q - 16, q).double() * weight.scales[:, column // weight.group].double()


def _fp8(weight, column: int) -> Tensor:
    byte = weight.data[:, column].int()
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, (byte & 7).double()
    normal = (1 + mantissa / 8) * torch.exp2(exponent.double() - 7)
    value = torch.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
    return torch.where(sign == 1, -value, value) * weight.scales[:, 0].double()


def _lossless(weight, column: int) -> Tensor:
    wide = weight.format == "lossless32"
    block, within = divmod(column, 64)
    half, position = divmod(within, 32)
    byte = next(i for i in range(32) if 8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 == position)
    row = weight.data.int()
    at = 16 + block * (224 if wide else 96)
    code = (row[:, at + byte] >> 4 * half) & 15
    top = row.gather(1, code[:, None].long())[:, 0]  # the row's table is its first 16 bytes
    bits = top << 24 | row[:, at + 32 + 32 * half + byte] << 16
    if wide:  # the 16 lower bits, little endian; groups of 8 are swapped in the middle of the half block
        lower = at + 96 + 64 * half + 2 * (16 * (byte % 16 // 8) + 8 * (byte // 16) + byte % 8)
        bits = bits | row[:, lower] | row[:, lower + 1] << 8
    column_of = bits.view(torch.float32).double()
    starts, columns, values = weight.exceptions
    for listed in (columns == column).nonzero()[:, 0].tolist():
        column_of[int((starts <= listed).sum()) - 1] = values[listed].double()
    return column_of
