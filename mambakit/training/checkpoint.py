"""Checkpoints of a run, from which it continues exactly: each written whole or not at all, the latest few kept.

A checkpoint is a folder ``step-<step>``. Its ``run.json`` is written last and holds the run's id, its whole
configuration and the size of every file, so that an incomplete checkpoint is recognised without reading it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mambakit.errors import CheckpointError
from mambakit.reading import read_pickle
from mambakit.training.distributed import ProcessMesh
from mambakit.writing import replace_text, set_aside

_NAME = re.compile(r"step-(\d{8,})(\.tmp)?")
_MARK = "run.json"
_SHARDS = "shards"


class Found(NamedTuple):
    """A folder of checkpoints' names; ``problem`` says why a run cannot resume from it, and is empty where it can."""

    path: Path
    step: int
    run: str | None
    problem: str


def find_checkpoints(folder: Path) -> list[Found]:
    """Every checkpoint in ``folder``, incomplete ones and those of other runs included, oldest first."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(Found(path, int(match[1]), *_state_of(path)) for match, path in named)


def checkpoints(folder: Path, run: str | None = None) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first; those of one run, where its id is given."""
    return [f.path for f in find_checkpoints(folder) if not f.problem and run in (None, f.run)]


def written_with(path: Path) -> dict[str, Any]:
    """The configuration of the run when it wrote one of `checkpoints`."""
    return json.loads((path / _MARK).read_text(encoding="utf-8"))["config"]


def remove_checkpoints(folder: Path, runs: Collection[str]) -> None:
    """Remove what these runs left in ``folder``, unfinished checkpoints included, and nothing else."""
    for found in find_checkpoints(folder):
        if found.run in runs or _is_empty(found.path):
            _remove(found.path)


def keep_latest(folder: Path, run: str, keep: int) -> None:
    """Remove the run's checkpoints but the latest ``keep`` that are whole."""
    mine = [f for f in find_checkpoints(folder) if f.run == run]
    kept = [f.path for f in mine if not f.problem][-keep:]
    for old in mine:
        if old.path not in kept:
            _remove(old.path)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: dict[str, Any], keep: int = 2,
    processes: ProcessMesh | None = None, run: str = "", config: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write ``folder/step-<step>`` under a temporary name, rename it, then remove all but the run's latest ``keep``.

    Args:
        extra: what else the run needs: numbers, strings, tensors, and lists and dictionaries of them.
        processes: the mesh; all of its processes make the call. Each writes its shard of a sharded model
            (torch.distributed.checkpoint); otherwise the first process writes everything.
        run: the run's id. Checkpoints of other runs are neither removed nor replaced: one in the way is renamed.
        config: the run's whole configuration, as JSON has it.
    """
    target = folder / f"step-{step:08d}"
    temporary = target.with_name(target.name + ".tmp")
    first = processes is None or processes.first
    mark = {"run": run, "step": step, "config": config or {}}
    if first:
        _make_way(temporary, run)
        temporary.mkdir(parents=True)
        _write_mark(temporary, mark)
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
            os.fsync(file.fileno())  # a rename that survives a power cut must not name an empty file
        sizes = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
        del sizes[_MARK]
        _write_mark(temporary, {**mark, "files": sizes})
        _make_way(target, run)
        os.replace(temporary, target)
        keep_latest(folder, run, keep)
    if processes is not None:
        processes.barrier()
    return target


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: ProcessMesh | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore a run's model and optimiser from one of `checkpoints`; returns its step and the extra state.

    The number of processes may differ from the one that wrote it.

    Raises:
        ValueError: it is damaged, or a sharded model's and this one is not, or the other way round.
    """
    remedy = f"remove {path.name} to continue from an earlier checkpoint"
    state = read_pickle(path / "state.pt", remedy)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("extra"), dict)
        or not isinstance(state.get("step"), int)
    ):
        raise CheckpointError(f"{path / 'state.pt'} is not a checkpoint of a run; {remedy}")
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


def _state_of(path: Path) -> tuple[str | None, str]:
    """(the run's id or None, why it cannot be resumed from or "")."""
    try:
        mark = json.loads((path / _MARK).read_text(encoding="utf-8"))
        run, sizes = str(mark["run"]), mark.get("files")
    except (OSError, ValueError, KeyError, TypeError):
        return None, "it does not say which run wrote it"
    if sizes is None or path.suffix == ".tmp":
        return run, "it was not finished"
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return run, f"{name} has {found:,} of {size:,} bytes" if found is not None else f"{name} is missing"
    return run, ""


def _write_mark(folder: Path, mark: dict[str, Any]) -> None:
    replace_text(folder / _MARK, json.dumps(mark, indent=2))


def _make_way(path: Path, run: str) -> None:
    """Remove what this run left at ``path``; what is not this run's is renamed."""
    if not path.exists():
        return
    begun = path.suffix == ".tmp" and {inside.name for inside in path.iterdir()} <= {_MARK + ".tmp"}
    if begun or _is_empty(path) or _state_of(path)[0] == run:
        _remove(path)
        return
    set_aside(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, its run.json last: what a crash leaves of it still names its run."""
    for inside in path.iterdir():
        if inside.is_dir():
            shutil.rmtree(inside)
        elif inside.name != _MARK:
            inside.unlink()
    (path / _MARK).unlink(missing_ok=True)
    path.rmdir()


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir())


def _sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
