"""How a new model's parameters are drawn.

Two recipes, told apart by whether the configuration's ``initializer_range`` was given:

- not given: mamba_ssm's. Linear layers and convolutions as PyTorch draws them, embeddings N(0, 0.02), out_proj divided by
  sqrt(layers). A 768 x 24 model's first loss is near ln(vocab_size).
- given: transformers'. Every linear layer and embedding N(0, initializer_range); the mixer's own parameters then as below.

Common to both, and how a mixer alone starts (`mambakit.modules.initialization`): A_log = log(1..n), D = 1, dt_proj.weight uniform
in +-r^-0.5 * time_step_scale, and dt_proj.bias the inverse softplus of a step drawn log-uniformly between time_step_min and
time_step_max. What is the model's alone: the embeddings, the division of out_proj, biases of zero.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init  # skips parameters that a checkpoint has filled

from mambakit.models.configuration import uses_mamba_ssm_recipe
from mambakit.modules import MambaMixer, RMSNorm
from mambakit.modules.initialization import initial_a_log
from mambakit.modules.mixers.mamba import TimeStepProjection

_EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(module: nn.Module, config) -> None:
    """Draw the parameters that are ``module``'s own, not those of its children: in any order, also module by module as FSDP does."""
    std = config.initializer_range
    as_mamba_ssm = uses_mamba_ssm_recipe(std)
    if isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=_EMBEDDING_STD if as_mamba_ssm else std)
    elif isinstance(module, TimeStepProjection):
        _initialize_time_steps(module)
    elif isinstance(module, nn.Linear):
        _initialize_linear(module, config, as_mamba_ssm)
    elif isinstance(module, nn.Conv1d):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None and as_mamba_ssm:
            edge = 1 / math.sqrt(module.kernel_size[0])
            init.uniform_(module.bias, -edge, edge)
        elif module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, MambaMixer):
        init.copy_(module.A_log, initial_a_log(module.A_log))
        init.ones_(module.D)


@torch.no_grad()
def initialize_in_turn(module: nn.Module, config) -> None:
    """`initialize` where all of a model's modules come in turn, children before parents, as `PreTrainedModel` walks them.

    dt_proj, conv1d and out_proj are drawn when their mixer's turn comes, and the linear ones in their own turn, too: a seed makes the
    model that it has always made.
    """
    if isinstance(module, nn.Conv1d):
        return
    if isinstance(module, nn.Linear):
        _initialize_plain_linear(module, config)
        return
    initialize(module, config)
    if isinstance(module, MambaMixer):
        for layer in (module.dt_proj, module.conv1d, module.out_proj):
            initialize(layer, config)


def _initialize_linear(linear: nn.Linear, config, as_mamba_ssm: bool) -> None:
    if not getattr(linear, "ends_residual_branch", False):
        _initialize_plain_linear(linear, config)
        return
    # kaiming_uniform_(a=sqrt 5) is U(+-1/sqrt(fan_in)); residual branches add up over layers, hence the division.
    edge = 1 / math.sqrt(linear.in_features)
    if as_mamba_ssm or config.rescale_prenorm_residual:
        edge /= math.sqrt(config.num_hidden_layers)
    init.uniform_(linear.weight, -edge, edge)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def _initialize_plain_linear(linear: nn.Linear, config) -> None:
    if uses_mamba_ssm_recipe(config.initializer_range):
        init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    else:
        init.normal_(linear.weight, std=config.initializer_range)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def _initialize_time_steps(projection: TimeStepProjection) -> None:
    bound = projection.steps.bound(projection.in_features)
    if projection.steps.scheme == "constant":
        init.constant_(projection.weight, bound)
    else:
        init.uniform_(projection.weight, -bound, bound)
    init.copy_(projection.bias, projection.steps.bias(projection.bias))
