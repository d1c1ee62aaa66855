"""Layers with packed weights as plans, beside the same layers' modules: on a GPU, and with the kernels on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

from mambakit import MambaConfig
from mambakit.modules import StateCache
from mambakit.modules.block import MambaBlock
from mambakit.modules.mixers import fused_layer
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.ops.fused_mixer import layer
from mambakit.ops.linear import triton_plan
from tests.ops.closeness import relative_error
from tests.ops.fused_mixer import plans_on_cpu
from tests.ops.fused_mixer.blocks import block_of
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted
from tests.ops.selective_scan import cuda_on_cpu

pytestmark = pytest.mark.skipif(INTERPRETED and cuda_on_cpu.COMPILER is None, reason="needs g++")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PROJECTIONS = ("in_proj", "x_proj", "out_proj")
BOUNDS = {BF16: 2e-2, F16: 3e-3, F32: 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def planned(monkeypatch, folder):
    """Layers run as plans, on a CPU too, from 33 rows on in half dtypes; the plans that ran."""
    plans: list[layer.Plan] = []

    def start(device: str) -> list[layer.Plan]:
        monkeypatch.setattr(triton_plan, "MOST_IN_REGISTERS", {"int8": 32, "int4": 32, "fp8": 32})
        monkeypatch.setattr(triton_plan, "HOPPER_PRODUCTS", {})
        if device == "cpu":
            plans_on_cpu.install(monkeypatch, folder)
        monkeypatch.setattr(layer, "_plans", {})
        forward = layer.Plan.forward
        monkeypatch.setattr(layer.Plan, "forward", lambda plan, *a: plans.append(plan) or forward(plan, *a))
        return plans

    yield start
    plans_on_cpu.forget()


def packed_block(
    format: str, device: str, dtype: torch.dtype, packed=PROJECTIONS, group: int = 64, **fields
) -> MambaBlock:
    block = block_of(fields, device, dtype).eval()
    for name in packed:
        setattr(block.mixer, name, QuantizedLinear.from_linear(getattr(block.mixer, name), format, group))
    return block


def states_of(block: MambaBlock, rows: int, fields: dict) -> StateCache:
    """Random states of ``rows`` rows, and one more."""
    weight = block.norm.weight
    cache = StateCache(
        MambaConfig(num_hidden_layers=1, **fields).state_spec(weight.dtype), rows + 1, device=weight.device
    )
    generator = torch.Generator().manual_seed(2)
    for memory in cache.memory(0):
        memory.copy_(torch.randn(memory.shape, generator=generator))
    return cache


@torch.no_grad()
def read(block: MambaBlock, shape: tuple[int, int], fields: dict, alone=False, states=True) -> dict[str, torch.Tensor]:
    """Outputs of a block, or of its mixer, and the states after it."""
    weight, generator = block.norm.weight, torch.Generator().manual_seed(1)
    x, before = (torch.randn(*shape, block.mixer.hidden_size, generator=generator).to(weight) for _ in range(2))
    cache = states_of(block, shape[0], fields) if states else None
    if alone:
        found = {"y": block.mixer(x, cache)}
    else:
        wide = torch.promote_types(F32, before.dtype) if block.residual_in_fp32 else before.dtype
        y, stream = block(x, before.to(wide), cache)
        found = {"y": y, "stream": stream}
    if cache is not None:
        found |= zip(("conv", "ssm"), cache.memory(0), strict=True)
    return found


def exact(block: MambaBlock, *arguments, **how) -> dict[str, torch.Tensor]:
    """The same in float64, of plain layers with the numbers that the packed weights stand for."""
    block = copy.deepcopy(block).cpu()
    for name in PROJECTIONS:
        linear = getattr(block.mixer, name)
        if type(linear) is QuantizedLinear:
            setattr(block.mixer, name, linear.dequantized(F32))
    return read(block.double(), *arguments, **how)


FIELDS = {"hidden_size": 64, "time_step_rank": 5}
CASES = {
    "int8": ("int8", BF16, FIELDS, 64),
    "float32": ("int8", F32, FIELDS | {"use_bias": True, "use_conv_bias": False}, 32),
    "falcon": ("int4", F16, FIELDS | {"mixer_rms_eps": 1e-3}, 64),
    "jamba": ("int4", BF16, FIELDS | {"mixer_rms_eps": 1e-3, "mixer_norm_weights": True, "use_bias": True}, 128),
    "fp8": ("fp8", F32, FIELDS | {"state_size": 5}, 64),
}


def without_float8(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < triton_plan.FLOAT8_CAPABILITY:
        pytest.skip("no 8-bit floats")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [{}, {"alone": True}, {"states": False}], ids=["block", "mixer", "zeros"])
@pytest.mark.parametrize("shape", [(3, 23), (2, 8)], ids=["many", "few"])
@pytest.mark.parametrize("case", CASES)
def test_beside_float64(device, how, shape, case, planned):
    """69 rows widen weights in memory, 16 in registers."""
    format, dtype, fields, group = CASES[case]
    if format == "fp8":
        without_float8(device)
    if INTERPRETED and shape == (2, 8) and dtype == BF16:  # whose products the interpreter takes for those of integers
        dtype = F16
    block = packed_block(format, device, dtype, group=group, **fields)
    want = exact(block, shape, fields, **how)
    plans = planned(device)
    found = read(block, shape, fields, **how)
    assert len(plans) == 1
    assert (plans[0].layout._widened == {}) == (shape == (2, 8))
    assert all(kind.format == format for kind in plans[0].signature.packed)
    for name, value in found.items():
        assert relative_error(value, want[name]) < BOUNDS[dtype], name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("alone", [False, True], ids=["block", "mixer"])
def test_rows_in_float8(device, residual, alone, planned, monkeypatch):
    """in_proj and out_proj multiply in 8 bits, as the modules do."""
    without_float8(device)
    fields = {"hidden_size": 512, "time_step_rank": 5, "residual_in_fp32": residual == F32}
    block = packed_block("fp8", device, BF16, **fields)
    plans = planned(device)
    found = read(block, (2, 21), fields, alone=alone)
    assert len(plans) == 1
    assert plans[0].layout.float8 == ["in_proj", "out_proj"]
    want = exact(block, (2, 21), fields, alone=alone)
    for name, value in found.items():
        assert relative_error(value, want[name]) < 8e-2, name
    if device == "cuda":  # a CPU's ops round no activations
        monkeypatch.setattr(fused_layer, "on_gpu", lambda x: False)
        modules = read(block, (2, 21), fields, alone=alone)
        for name, value in found.items():
            assert relative_error(value, modules[name]) < 1e-2, name
        assert len(plans) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_slabs(device, planned, monkeypatch):
    """A weight that is widened 128 rows at a time, with a bias in every row and some layers plain."""
    monkeypatch.setattr(triton_plan, "SLABS_BY_ROWS", ((1 << 30, 1),))
    fields = {"hidden_size": 192, "use_bias": True, "time_step_rank": 12}
    block = packed_block("int8", device, F32, ("in_proj", "out_proj"), **fields)
    want = exact(block, (1, 40), fields)
    plans = planned(device)
    found = read(block, (1, 40), fields)
    assert [kind and kind.format for kind in plans[0].signature.packed] == ["int8", None, "int8"]
    for name, value in found.items():
        assert relative_error(value, want[name]) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
def test_other_ways(device, planned):
    """Lossless weights, gradients, autocast of a mixer alone, a hook: the modules are called."""
    plans = planned(device)
    block = packed_block("int8", device, BF16, **FIELDS)
    read(packed_block("lossless16", device, BF16, **FIELDS), (3, 23), FIELDS)
    x = torch.randn(3, 23, 64, device=device, dtype=BF16, requires_grad=True)
    y, _ = block(x)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    mixer = packed_block("int8", device, F32, **FIELDS).mixer
    with torch.no_grad(), torch.autocast(device, BF16):
        mixer(torch.randn(3, 23, 64, device=device))
    assert plans == []
    read(block, (1, 33), FIELDS)
    assert len(plans) == 1
    block.mixer.x_proj.register_forward_hook(lambda *_: None)
    read(block, (1, 33), FIELDS)
    assert len(plans) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_that_is_quantised_again(device, planned):
    """Other numbers in the same buffers, then other layers in their places, are read."""
    plans = planned(device)
    block = packed_block("int8", device, F32, **FIELDS)
    first = read(block, (1, 40), FIELDS)["y"]
    block.mixer.out_proj.scales.mul_(2)
    assert relative_error(read(block, (1, 40), FIELDS)["y"], 2 * first) < 1e-6
    block.mixer.out_proj = QuantizedLinear.from_linear(block.mixer.out_proj.dequantized(F32), "int4")
    again = read(block, (1, 40), FIELDS)["y"]
    assert relative_error(again, exact(block, (1, 40), FIELDS)["y"]) < 1e-5
    assert len(plans) == 3


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
