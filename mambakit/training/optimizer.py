"""AdamW with the field's parameter groups, and the learning rate's schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

# A_log and D are parameters of the recurrence, not weights: decay would pull every channel to one time scale.
_NEVER_DECAYED = ("A_log", "D", "embeddings.weight", "embedding.weight")
# Nor is a learned initial state (`mambakit.training.state_tuning`), by its place in the model.
INITIAL_STATE = "initial_state"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, decayed; and A_log, D, biases, norms, convolutions, embeddings and a learned state, not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.dim() < 2 or name.endswith(_NEVER_DECAYED) or name.startswith(f"{INITIAL_STATE}.")
        (free if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def make_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW. On CUDA the rate is a tensor, so that a captured step reads the schedule's current value."""
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    rate = torch.tensor(learning_rate, dtype=torch.float32, device=device) if on_cuda else learning_rate
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=True, capturable=on_cuda)


def rates_to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put the learning rates of a loaded optimiser back where a captured step reads them.

    A rate on the CPU would be read when the step is captured, and stay what it was then.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].to(device)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def schedule_factor(progress: float, kind: str, warmup: float, final: float) -> float:
    """The learning rate as a fraction of its peak, ``progress`` through the run (0 to 1)."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup))
    if kind == "wsd":
        return 1.0 if done < 0.8 else 1.0 - (1.0 - final) * (done - 0.8) / 0.2
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
