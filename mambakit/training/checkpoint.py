"""What a run needs to continue exactly, written all or not at all, and the latest few kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mambakit.training.distributed import Processes

_PREFIX = "step-"
_SHARDS = "shards"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first. One that was being written has a temporary name."""
    return sorted(path.parent for path in folder.glob(f"{_PREFIX}*/state.pt") if path.parent.suffix != ".tmp")


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: dict[str, Any], keep: int = 2,
    processes: Processes | None = None,
) -> Path:  # fmt: skip
    """Write ``folder/step-<step>`` under a temporary name, put it in its place, then remove all but the latest ``keep``.

    Args:
        extra: what else the run needs: numbers, strings, tensors, and lists and dictionaries of them.
        processes: those that train together; all of them make the call. A sharded model is written in shards, each process
            its own (torch.distributed.checkpoint); otherwise the first process writes everything.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    temporary = target.with_name(target.name + ".tmp")
    first = processes is None or processes.first
    if first:
        for leftover in (*folder.glob(f"{_PREFIX}*.tmp"), target):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    state = {"step": step, "extra": extra}
    if processes is not None and processes.mode == "fsdp":
        import torch.distributed.checkpoint as dcp

        processes.barrier()
        dcp.save(_sharded_state(model, optimizer), checkpoint_id=temporary / _SHARDS)
    else:
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if first:
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the name must not outlive a crash of the machine that the contents do not
        os.replace(temporary, target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if processes is not None:
        processes.barrier()
    return target


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore a run's model and optimiser from one of `checkpoints`; returns its step and the extra state.

    The number of processes may differ from the one that wrote it.

    Raises:
        ValueError: it is a sharded model's and this one is not, or the other way round.
    """
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    sharded = processes is not None and processes.mode == "fsdp"
    if sharded != ("model" not in state):
        wrote = "none or ddp" if sharded else "fsdp"
        raise ValueError(f"{path} was written with parallel={wrote}; resume with that")
    if sharded:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        shards = _sharded_state(model, optimizer)
        dcp.load(shards, checkpoint_id=path / _SHARDS)
        set_model_state_dict(model, shards["model"])
        set_optimizer_state_dict(model, optimizer, shards["optimizer"])
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["extra"]


def _sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
