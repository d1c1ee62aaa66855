"""Modules draw their own parameters, alone as in a model; a model adds the embeddings, the division of out_proj, zero
biases."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mambakit
from mambakit.models.mamba.initialization import initialize
from mambakit.modules import MambaBlock, MambaMixer, RMSNorm
from tests.models.configurations import worst
from tests.training.launch import launch

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 4, "use_bias": True}


def config_of(**fields) -> mambakit.MambaConfig:
    return mambakit.MambaConfig(**{**FIELDS, **fields})


def steps_of(mixer: MambaMixer) -> torch.Tensor:
    return nn.functional.softplus(mixer.dt_proj.bias.detach().double())


def require_mixer(mixer: MambaMixer, config: mambakit.MambaConfig, division: float = 1.0) -> None:
    """What mamba_ssm's `Mamba` starts with."""
    steps = steps_of(mixer)
    low, high = config.time_step_min, config.time_step_max
    assert 0.999 * max(low, config.time_step_floor) < steps.min()
    assert steps.max() < 1.001 * max(high, config.time_step_floor)
    if low < high and config.time_step_floor <= low:  # log-uniform: the middle of the logarithms
        middle = math.sqrt(low * high)
        assert 0.3 < (steps < middle).double().mean() < 0.7
    bound = mixer.time_step_rank**-0.5 * config.time_step_scale
    if config.time_step_init_scheme == "constant":
        assert torch.equal(mixer.dt_proj.weight, torch.full_like(mixer.dt_proj.weight, bound))
    else:
        assert 0.9 * bound < mixer.dt_proj.weight.abs().max() <= bound
    states = torch.arange(1, config.state_size + 1, dtype=torch.float64)
    assert worst(mixer.A_log, states.log().expand(mixer.A_log.shape)) < 1e-6
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    d = mixer.intermediate_size
    for weight, fan_in, by in (
        (mixer.in_proj.weight, mixer.hidden_size, 1.0), (mixer.x_proj.weight, d, 1.0),
        (mixer.conv1d.weight, config.conv_kernel, 1.0), (mixer.out_proj.weight, d, division),
    ):  # fmt: skip
        edge = fan_in**-0.5 / by
        assert 0.98 * edge < weight.abs().max() <= 1.0001 * edge
        assert abs(weight.std() * math.sqrt(3) - edge) < 0.1 * edge
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias)} <= {torch.float32, torch.float64}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"time_step_min": 0.01, "time_step_max": 0.5},
        {"time_step_min": 1e-6, "time_step_max": 1e-3, "time_step_floor": 1e-4},
        {"time_step_init_scheme": "constant", "time_step_scale": 2.0, "time_step_rank": 7},
        {"time_step_min": 0.05, "time_step_max": 0.05, "state_size": 5, "conv_kernel": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mixer_and_a_block_alone(fields, dtype):
    config = config_of(**fields)
    torch.set_default_dtype(dtype)
    try:
        mixer, block = MambaMixer(config), MambaBlock(config, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    require_mixer(mixer, config)
    require_mixer(block.mixer, config)
    assert torch.equal(block.norm.weight, torch.ones_like(block.norm.weight))
    assert not torch.equal(mixer.in_proj.weight, block.mixer.in_proj.weight)


@pytest.mark.parametrize(
    "name", ["MambaModel", "MambaForCausalLM", "MambaForSequenceClassification", "FalconMambaForCausalLM"]
)
def test_a_model_adds_what_is_its_own(name):
    kind = getattr(mambakit, name)
    config = kind.config_class(**FIELDS)
    model = kind(config)
    for block in getattr(model, "backbone", model).layers:
        require_mixer(block.mixer, config, division=2.0)  # sqrt(4 layers)
        assert not block.mixer.in_proj.bias.any()
        assert not block.mixer.out_proj.bias.any()
        assert block.mixer.conv1d.bias.any()
    assert 0.018 < model.get_input_embeddings().weight.std() < 0.022


def test_transformers_recipe_where_the_range_is_given():
    config = config_of(initializer_range=0.3, rescale_prenorm_residual=False)
    mixer = mambakit.MambaModel(config).layers[0].mixer
    assert 0.28 < mixer.in_proj.weight.std() < 0.32
    edge = mixer.intermediate_size**-0.5
    assert 0.98 * edge < mixer.out_proj.weight.abs().max() <= edge
    assert 0.001 * 0.99 < steps_of(mixer).min() < steps_of(mixer).max() < 0.101


def spoil(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))


@pytest.mark.parametrize(
    "make",
    [lambda c: MambaMixer(c), lambda c: MambaBlock(c, 0), lambda c: mambakit.MambaForCausalLM(c), lambda c: RMSNorm(9)],
)
def test_from_meta(make):
    config = config_of()
    with torch.device("meta"):
        module = make(config)
    module.to_empty(device="cpu")
    spoil(module)
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())
    for each in module.modules():
        if isinstance(each, MambaMixer):
            require_mixer(each, config, division=2.0 if isinstance(module, mambakit.MambaForCausalLM) else 1.0)
    if isinstance(module, mambakit.MambaForCausalLM):
        assert module.lm_head.weight is module.backbone.embeddings.weight
        assert 0.018 < module.lm_head.weight.std() < 0.022


@pytest.mark.parametrize("order", [1, -1])
def test_one_module_after_another(order):
    """As FSDP's deferred initialisation does: each module's own tensors are allocated and drawn, parents first or
    last."""
    config = config_of(tie_word_embeddings=False)
    for by_model in (True, False):
        with torch.device("meta"):
            model = mambakit.MambaForCausalLM(config)
        for module in list(model.modules())[::order]:
            if next(iter(module.parameters(recurse=False)), None) is not None:
                module.to_empty(device="cpu", recurse=False)
                for parameter in module.parameters(recurse=False):
                    parameter.data.fill_(float("nan"))
                if by_model:
                    initialize(module, config)
                else:
                    module.reset_parameters()
        assert all(p.isfinite().all() for p in model.parameters())
        for block in model.backbone.layers:
            require_mixer(block.mixer, config, division=2.0 if by_model else 1.0)


def test_reset_draws_anew_whatever_was_loaded(tmp_path):
    config = config_of()
    model = mambakit.MambaForCausalLM(config)
    model.save_pretrained(tmp_path)
    loaded = mambakit.MambaForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    torch.manual_seed(7)
    loaded.reset_parameters()
    torch.manual_seed(7)
    model.reset_parameters()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(model.lm_head.weight, mambakit.MambaForCausalLM.from_pretrained(tmp_path).lm_head.weight)
    with pytest.raises(ValueError, match=r"dequantize\(\)"):
        model.quantize("int8").reset_parameters()


def test_a_head_that_the_file_has_not_is_drawn_and_nothing_else(tmp_path):
    model = mambakit.MambaForCausalLM(config_of())
    spoiled = {n: torch.full_like(t, 0.5) for n, t in model.state_dict().items()}
    model.load_state_dict(spoiled)
    model.save_pretrained(tmp_path)
    classifier = mambakit.MambaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert all((p == 0.5).all() for p in classifier.backbone.parameters())
    assert 0 < classifier.score.weight.std() < 0.2


def _sharded() -> tuple[bool, list[float], bool]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = config_of(tie_word_embeddings=False)
    with torch.device("meta"):
        model = mambakit.MambaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.reset_parameters()
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    steps = nn.functional.softplus(whole["backbone.layers.0.mixer.dt_proj.bias"])
    edge = whole["backbone.layers.0.mixer.out_proj.weight"].abs().max().item() * math.sqrt(128 * 4)
    states = whole["backbone.layers.1.mixer.A_log"][-1].exp()
    sound = all(t.isfinite().all() for t in whole.values()) and worst(states, torch.arange(1.0, 17)) < 1e-5
    loss = model(torch.randint(1, 60, (2, 9)), labels=torch.randint(1, 60, (2, 9))).loss
    return bool(sound), [steps.min().item(), steps.max().item(), edge], abs(loss.item() - math.log(61)) < 0.3


@pytest.mark.slow
def test_sharded_tensors():
    """FSDP2: meta, sharded, allocated, drawn; of two processes."""
    for sound, (low, high, edge), near in launch(_sharded, 2):
        assert sound
        assert 0.00099 < low < high < 0.101
        assert 0.98 < edge <= 1.0001
        assert near


def test_the_home_that_earlier_documentation_names(monkeypatch):
    monkeypatch.delitem(sys.modules, "mambakit.models.initialization", raising=False)
    with pytest.warns(DeprecationWarning, match="mambakit.models.mamba.initialization"):
        assert importlib.import_module("mambakit.models.initialization").initialize is initialize
