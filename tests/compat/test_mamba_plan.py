"""compat's Mamba as a plan (`mambakit.ops.fused_mixer.layer`): on a GPU, and on a CPU with the kernels by address."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

from mambakit.compat.mamba import Mamba
from mambakit.ops.fused_mixer import layer as layers
from tests.compat.oracles import error
from tests.ops.fused_mixer import plans_on_cpu
from tests.ops.interpreter import DEVICES, INTERPRETED, run_interpreted
from tests.ops.selective_scan import cuda_on_cpu

pytestmark = pytest.mark.skipif(INTERPRETED and cuda_on_cpu.COMPILER is None, reason="needs g++")


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_runs_as_a_plan(device, monkeypatch, tmp_path):
    """Output and gradients beside float64; a hook, a second direction and states go the other way."""
    passes = []
    if device == "cpu":
        plans_on_cpu.install(monkeypatch, tmp_path)
    for name in ("forward", "backward"):
        kept = getattr(layers.Plan, name)
        monkeypatch.setattr(layers.Plan, name, lambda *a, n=name, k=kept: passes.append(n) or k(*a))
    layer = Mamba(16, d_state=8, dt_rank=8).to(device)
    exact = copy.deepcopy(layer).cpu().double()
    x, dy = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    y = layer(x.to(device))
    y.backward(dy.to(device))
    assert passes == ["forward", "backward"]
    expected = exact(x.double())
    expected.backward(dy.double())
    assert error(y.cpu(), expected) < 1e-5
    for name, parameter in layer.named_parameters():
        assert error(parameter.grad.cpu(), exact.get_parameter(name).grad) < 2e-5, name
    passes.clear()
    layer.conv1d.register_forward_hook(lambda *a: None)
    assert error(layer(x.to(device)).cpu(), expected) < 1e-5
    assert passes == []
    Mamba(16, bimamba_type="v2").to(device)(x.to(device))
    assert passes == ["forward", "forward"], "what lies between the projections, in each direction"
    plans_on_cpu.forget()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_interpreter():
    run_interpreted(__file__)
