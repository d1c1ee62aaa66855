"""What a new `Mamba` layer's parameters start from, as upstream draws them (arXiv 2312.00752, section 3.6)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def start_steps(dt_proj: nn.Linear, low: float, high: float, scheme: str, scale: float, floor: float) -> None:
    """Weights within +- r^-0.5 * scale, and biases whose softplus is log-uniform from ``low`` to ``high``."""
    bound = dt_proj.in_features**-0.5 * scale
    if scheme == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    else:
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    bias = dt_proj.bias
    uniform = torch.rand(bias.shape, device=bias.device, dtype=bias.dtype)
    steps = torch.exp(uniform * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    with torch.no_grad():
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))
    bias._no_reinit = True  # type: ignore[attr-defined]


def initial_a_log(d: int, n: int, device: Any) -> nn.Parameter:
    """log(1), ..., log(n) for every channel (S4D-real), float32 in a layer of any dtype."""
    log = torch.log(torch.arange(1, n + 1, dtype=torch.float32, device=device))
    parameter = nn.Parameter(log.repeat(d, 1))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def initial_d(d: int, device: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(d, device=device, dtype=torch.float32))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
