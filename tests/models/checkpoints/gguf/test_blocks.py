"""Blocks of numbers: read as they are defined, packed without a change, and rounded to the nearest that they hold."""

from __future__ import annotations

import random
import struct

import pytest
import torch

from mambakit.models.checkpoints.gguf import types
from mambakit.models.checkpoints.gguf.blocks import bytes_of, numbers_of, packed_of
from mambakit.ops.linear import linear
from mambakit.ops.linear import reference as oracle
from tests.models.checkpoints.gguf import blocks_one_by_one as one_by_one

BLOCKS = {name: getattr(types, name) for name in one_by_one.NUMBER}


def random_blocks(name: str, count: int, seed: int = 0) -> bytes:
    """Any bits, with float16 numbers that are finite."""
    choice = random.Random(seed)
    blocks = [bytearray(choice.randbytes(BLOCKS[name].bytes)) for _ in range(count)]
    for block in blocks:
        for at in one_by_one.HALVES[name]:
            block[at : at + 2] = struct.pack("<e", choice.uniform(-2, 2))
    return b"".join(blocks)


def as_tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_number_of_a_block(name):
    type, raw = BLOCKS[name], random_blocks(name, 12)
    expected = torch.tensor(one_by_one.numbers(name, raw, type.bytes, type.numbers), dtype=torch.float64)
    read = numbers_of(as_tensor(raw), type, (3, 4 * type.numbers))
    assert read.dtype == torch.float32
    # One float32 rounding of a product, and one of a difference.
    torch.testing.assert_close(read.double().flatten(), expected, rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("columns", [32, 64, 96, 224])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_packed_weights_are_the_same_numbers(name, columns):
    """Q8_0's integers may be -128, which `pack` never makes."""
    out, type = 7, BLOCKS[name]
    raw = bytearray(random_blocks(name, out * columns // 32))
    raw[2:6] = b"\x80\x80\x7f\x00"
    weight = packed_of(as_tensor(bytes(raw)), type, (out, columns))
    expected = torch.tensor(one_by_one.numbers(name, raw, type.bytes, 32), dtype=torch.float64).view(out, columns)
    assert torch.equal(oracle.numbers(weight), expected)
    assert torch.equal(weight.dequantized().double(), expected.float().double())
    x = torch.randn(3, columns)
    y = linear(x, weight)
    reference = oracle.linear(x, weight, x_in_16_bits=True)
    assert (y.double() - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_rounding(name):
    """The error is half a step, of a scale that float16 has rounded; 0 and the largest number are kept."""
    torch.manual_seed(0)
    type, x = BLOCKS[name], torch.randn(5, 96)
    x[0] = 0
    raw = bytes_of(x, type)
    assert len(raw) == 5 * 3 * type.bytes
    back = numbers_of(as_tensor(raw), type, (5, 96))
    peak = x.unflatten(1, (3, 32)).abs().amax(2, keepdim=True).expand(-1, -1, 32).flatten(1)
    levels = 127 if name == "Q8_0" else 8
    # float16's rounding of the scale: 2^-11 of each number. Q4_0 has no +8: the far side is a whole step off at most.
    most = peak / levels * (0.5 if name == "Q8_0" else 1.0) + peak * 2**-11 + 1e-7
    assert ((back - x).abs() <= most).all()
    assert bytes_of(back[1:], type) == raw[3 * type.bytes :], "what is rounded once stays as it is"


def test_halves_are_rounded_away_from_zero():
    """As C's roundf: 127 is the largest, so the scale is 1."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([127.0, 0.5, -0.5, 1.5, 2.5, -2.5])
    assert numbers_of(as_tensor(bytes_of(x, types.Q8_0)), types.Q8_0, (1, 32))[0, :6].tolist() == [
        127, 1, -1, 2, 3, -3,
    ]  # fmt: skip


def test_against_the_gguf_package():
    """Its quantiser is a translation of ggml's reference: the same bytes."""
    quants = pytest.importorskip("gguf.quants")
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(1)
    x = torch.randn(9, 512) * torch.randn(9, 1).exp()
    for name in ("Q8_0", "Q4_0", "BF16", "F16"):
        theirs = quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
        assert theirs.tobytes() == bytes_of(x, getattr(types, name)), name
    for name, type in BLOCKS.items():
        raw = random_blocks(name, 6)
        theirs = quants.dequantize(as_tensor(raw).view(2, -1).numpy(), gguf.GGMLQuantizationType[name])
        torch.testing.assert_close(
            numbers_of(as_tensor(raw), type, (2, 3 * type.numbers)), torch.from_numpy(theirs), rtol=1e-6, atol=1e-6
        )
