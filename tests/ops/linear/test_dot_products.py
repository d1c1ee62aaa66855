"""Products on processors that are not here: AVX-VNNI by its arithmetic in C++, Arm's extensions in an emulator."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mambakit.ops.linear import pack, reference
from mambakit.ops.linear.cpu import KINDS
from tests.ops.closeness import relative_error

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("mambakit/ops/linear/native.cpp", "mambakit/ops/_backends/runtime.cpp", "tests/ops/linear/one_product.cpp")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
ARM = "-march=armv8.2-a+dotprod"


@dataclass(frozen=True)
class Target:
    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()


TARGETS = {
    "avx2vnni": Target("g++", (*AVX2, "-DMAMBAKIT_EMULATED")),
    "dotprod": Target("aarch64-linux-gnu-g++", (ARM,), ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")),
    "i8mm": Target(
        "aarch64-linux-gnu-g++", (ARM + "+i8mm",), ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
    ),
}


def compiled(folder: Path, isa: str, target: Target, *more: str) -> list[str]:
    """The command that runs `one_product.cpp` for an instruction set."""
    for program in (target.compiler, *target.emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")
    program = folder / isa
    command = [target.compiler, "-std=c++17", "-O2", "-w", "-ffp-contract=fast", f"-DMAMBAKIT_ISA={isa}"]
    command += [f"-I{ROOT / 'mambakit/ops/_backends/include'}", *target.flags, *more]
    command += [*(str(ROOT / source) for source in SOURCES), "-lpthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return [*target.emulator, str(program)]


@pytest.fixture(scope="module", params=TARGETS)
def program(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("isa"), request.param, TARGETS[request.param])


def product(program: list[str], x: torch.Tensor, packed) -> torch.Tensor:
    arrays = [x.numpy().tobytes(), packed.data.numpy().tobytes(), packed.scales.numpy().tobytes()]
    shape = (KINDS[packed.format], len(x), packed.in_features, packed.out_features, packed.group)
    given = struct.pack("8q", *shape, *map(len, arrays)) + b"".join(arrays)
    found = subprocess.run(program, input=given, capture_output=True, check=True).stdout
    return torch.from_numpy(np.frombuffer(found, np.float32).copy()).view(len(x), packed.out_features)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 65, 130, 300])
def test_products_are_those_of_x_in_16_bits(program, format, group, columns):
    packed = pack(torch.randn(9, columns), format, group)
    x = torch.randn(7, columns) * torch.logspace(-10, 10, columns)  # every group has a scale of its own
    rounded = reference.in_16_bits(x, group)
    want, size = (a @ b.T for a, b in ((rounded, packed.dequantized().double()),
                                       (rounded.abs(), packed.dequantized().double().abs())))  # fmt: skip
    got = product(program, x, packed)
    # A tie may round either way where float32 and this test divide differently: 2^-16.
    assert ((got - want).abs() <= 2**-16 * size).all()
    assert torch.equal(product(program, x[3:4], packed), got[3:4])  # a row alone is the row of a batch


def test_integers_of_every_size(program):
    """-128, which other quantisers have, and activations at the ends of 16 bits."""
    packed = pack(torch.randn(5, 128), "int8")
    packed.data[:] = torch.randint(-128, 128, packed.data.shape)
    packed.data[0], packed.data[1] = -128, 127
    x = torch.randn(3, 128)
    x[0], x[1] = 1.0, -1.0
    want = reference.in_16_bits(x, 64) @ packed.dequantized().double().T
    assert relative_error(product(program, x, packed), want) < 2e-6


def test_avx_vnni_compiles_to_its_instruction(tmp_path):
    if shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("there is no g++ or objdump here")
    target = tmp_path / "linear.o"
    command = ["g++", "-std=c++17", "-O2", "-w", "-c", *AVX2, "-mavxvnni", "-DMAMBAKIT_ISA=avx2vnni"]
    command += [f"-I{ROOT / 'mambakit/ops/_backends/include'}", str(ROOT / SOURCES[0]), "-o", str(target)]
    subprocess.run(command, check=True)
    listing = subprocess.run(["objdump", "-d", str(target)], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listing.splitlines() if "vpdpbusd" in line]
    assert len(lines) > 50
    assert all("{vex}" in line and "%ymm" in line and "%zmm" not in line for line in lines)
