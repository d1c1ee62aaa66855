"""The initial values of a new model's parameters.

There are two recipes. The configuration's ``initializer_range`` chooses:

- not given: mamba_ssm's. Linear layers and convolutions as PyTorch draws them, embeddings N(0, 0.02), out_proj divided
  by sqrt(layers). A 768 x 24 model's first loss is near ln(vocab_size).
- given: transformers'. Every linear layer and embedding N(0, initializer_range).

In both, the mixer's own parameters start as in a mixer alone (`mambakit.modules.initialization`): A_log = log(1..n),
D = 1, dt_proj.weight uniform in +-r^-0.5 * time_step_scale, and dt_proj.bias the inverse softplus of a step drawn
log-uniformly between time_step_min and time_step_max. The embeddings, the division of out_proj and zero biases need the
model.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init  # skips parameters that a checkpoint has filled

from mambakit.models.configuration import uses_mamba_ssm_recipe
from mambakit.modules import MambaMixer, MixerNorm, RMSNorm
from mambakit.modules.mixers import Mixer
from mambakit.modules.mixers.time_steps import TimeStepProjection

_EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(module: nn.Module, config) -> None:
    """Draw ``module``'s own parameters, not its children's. Modules may come in any order, as FSDP calls them."""
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
    elif isinstance(module, (RMSNorm, MixerNorm)):
        init.ones_(module.weight)
    elif isinstance(module, Mixer):
        for name, value in module.initial_values().items():
            init.copy_(getattr(module, name), value)


@torch.no_grad()
def initialize_in_turn(module: nn.Module, config) -> None:
    """`initialize` for `PreTrainedModel`'s walk over all modules, children before parents.

    dt_proj, conv1d and out_proj are drawn after the rest of their mixer, and the linear ones also in their own turn.
    The
    order of random numbers is fixed: a seed gives the model that it gave in every release.
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
