"""What a run needs to continue exactly: parameters, optimiser, step and time spent, written all or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write ``folder`` under a temporary name, then put it in the place of the previous one."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, temporary / "state.pt")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore a run's model and optimiser; returns the step and the seconds it had come to."""
    path = folder / "state.pt"
    if not path.is_file():  # the process may have died between the two renames
        path = folder.with_name(folder.name + ".old") / "state.pt"
    if not path.is_file():
        raise ValueError(f"resume=true, but there is no checkpoint {folder / 'state.pt'}; start without resume")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]
