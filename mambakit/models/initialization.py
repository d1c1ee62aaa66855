"""How a new model's parameters are drawn.

Two recipes, told apart by whether the configuration's ``initializer_range`` was given:

- not given: mamba_ssm's. Linear layers and convolutions as PyTorch draws them, embeddings N(0, 0.02), out_proj divided by
  sqrt(layers). A 768 x 24 model's first loss is near ln(vocab_size).
- given: transformers'. Every linear layer and embedding N(0, initializer_range); the mixer's own parameters then as below.

Common to both (Gu & Dao 2023, section 3.6 and appendix E): A_log = log(1..n), D = 1, dt_proj.weight uniform in
+-r^-0.5 * time_step_scale, and dt_proj.bias the inverse softplus of a step drawn log-uniformly between time_step_min
and time_step_max.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init  # skips parameters that a checkpoint has filled

from mambakit.modules import MambaMixer, RMSNorm

_EMBEDDING_STD = 0.02


class _UnsetRange(float):
    """The default of ``initializer_range``: transformers' value, and recognisable as not given."""


UNSET_RANGE = _UnsetRange(0.1)


def uses_mamba_ssm_recipe(initializer_range: float) -> bool:
    return isinstance(initializer_range, _UnsetRange)


@torch.no_grad()
def initialize(module: nn.Module, config) -> None:
    """Draw the parameters of one module (children before parents, as `PreTrainedModel` walks them)."""
    std = config.initializer_range
    as_mamba_ssm = uses_mamba_ssm_recipe(std)
    if isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=_EMBEDDING_STD if as_mamba_ssm else std)
    elif isinstance(module, nn.Linear):
        if as_mamba_ssm:
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        else:
            init.normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, MambaMixer):
        _initialize_mixer(module, config, as_mamba_ssm)


def _initialize_mixer(mixer: MambaMixer, config, as_mamba_ssm: bool) -> None:
    device = mixer.A_log.device
    states = torch.arange(1, mixer.ssm_state_size + 1, dtype=torch.float32, device=device)
    init.copy_(mixer.A_log, torch.log(states).expand_as(mixer.A_log))
    init.ones_(mixer.D)

    bound = mixer.time_step_rank**-0.5 * config.time_step_scale
    if config.time_step_init_scheme == "constant":
        init.constant_(mixer.dt_proj.weight, bound)
    else:
        init.uniform_(mixer.dt_proj.weight, -bound, bound)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.exp(torch.rand(mixer.intermediate_size, device=device) * (high - low) + low)
    dt = dt.clamp(min=config.time_step_floor)
    init.copy_(mixer.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    init.kaiming_uniform_(mixer.conv1d.weight, a=math.sqrt(5))
    if mixer.conv1d.bias is not None:
        if as_mamba_ssm:
            edge = 1 / math.sqrt(mixer.conv_kernel_size)
            init.uniform_(mixer.conv1d.bias, -edge, edge)
        else:
            init.zeros_(mixer.conv1d.bias)
    # kaiming_uniform_(a=sqrt 5) is U(+-1/sqrt(fan_in)); residual branches add up over layers, hence the division.
    edge = 1 / math.sqrt(mixer.intermediate_size)
    if as_mamba_ssm or config.rescale_prenorm_residual:
        edge /= math.sqrt(config.num_hidden_layers)
    init.uniform_(mixer.out_proj.weight, -edge, edge)
