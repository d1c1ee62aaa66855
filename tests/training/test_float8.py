"""Training with projections in float8: torchao's layers, emulated on a CPU where it is installed; what is refused."""

import importlib.util

import pytest
import torch

import mambakit
from mambakit.errors import RequirementError
from mambakit.training.config import TrainConfig
from mambakit.training.float8 import plain_layers, require_float8, use_float8

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def made(**shape) -> mambakit.MambaForCausalLM:
    torch.manual_seed(0)
    config = mambakit.MambaConfig(**({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96} | shape))
    return mambakit.MambaForCausalLM(config).train()


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
def test_the_same_parameters_and_gradients_near_the_plain_ones():
    model, ids = made(use_bias=True), torch.randint(0, 96, (2, 32))
    names, plain = dict(model.named_parameters()), gradients(model, ids)
    use_float8(model, 64, emulate=True, compile_layers=False)
    kinds = {type(layer.mixer.in_proj).__name__ for layer in model.backbone.layers}
    assert kinds == {type(layer.mixer.out_proj).__name__ for layer in model.backbone.layers} == {"Float8Linear"}
    assert type(model.backbone.layers[0].mixer.x_proj) is torch.nn.Linear
    assert type(model.lm_head) is torch.nn.Linear
    assert all(p is names[name] for name, p in model.named_parameters())
    found = gradients(model, ids)
    for name, gradient in found.items():
        error = (gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-12)
        assert 0 < error < 0.2, name  # e5m2 has two bits behind the point
    again = plain_layers(model)
    assert all(p is names[name] for name, p in again.named_parameters())
    assert all(torch.equal(g, plain[name]) for name, g in gradients(again, ids).items())
    assert not any(type(m).__module__.startswith("torchao") for m in again.modules())


@pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
def test_sizes_that_it_does_not_take():
    with pytest.raises(ValueError, match="a micro-batch has 63 tokens .* multiples of 16; change sequence_length"):
        use_float8(made(), 63, emulate=True)
    with pytest.raises(ValueError, match="a projection of 40 to 160; both must be multiples of 16"):
        use_float8(made(hidden_size=40), 64, emulate=True)


def test_what_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequirementError, match="pip install torchao"):
        require_float8(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="the run is on the cpu; drop it"):
        require_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8.9 or later .* has 8.0; drop it"):
        require_float8(torch.device("cuda"))


def test_settings_that_exclude_it():
    with pytest.raises(ValueError, match='autocast is "float32"; drop one of them'):
        TrainConfig(float8=True, autocast="float32")
    with pytest.raises(ValueError, match="not adapters or a state; drop one of them"):
        TrainConfig(float8=True, init_from="x", lora_rank=4)
    assert not TrainConfig().float8


@pytest.mark.cuda
@pytest.mark.skipif(not (HAS_TORCHAO and torch.cuda.is_available()), reason="no GPU, or no torchao")
def test_a_captured_step_learns():
    from mambakit.training.optimizer import make_optimizer
    from mambakit.training.step import CapturedStep, TrainingStep

    losses = {}
    for float8 in (False, True):
        model = made(hidden_size=256).cuda()
        if float8:
            use_float8(model, 2048)
        optimizer = make_optimizer(model, 3e-3, (0.9, 0.95), 0.1)
        step = CapturedStep(TrainingStep(model, optimizer, 1.0, "bfloat16", False))
        rows = torch.randint(0, 96, (8, 257), device="cuda")
        begins = torch.zeros(8, 257, dtype=torch.bool, device="cuda")
        losses[float8] = [step.run(rows, begins)[0].item() for _ in range(30)]
    assert losses[True][-1] < 0.8 * losses[True][0]
    assert abs(losses[True][-1] - losses[False][-1]) < 0.1 * losses[False][-1]
