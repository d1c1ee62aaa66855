"""The weights with the lowest held-out loss so far, kept on the disk, and when a run ends without a lower one.

The file is ``checkpoints/best-<step>.safetensors``. A resumed run that repeats steps finds the file of its checkpoint:
it stays until a later checkpoint knows of a better one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mambakit.errors import CheckpointError
from mambakit.training.distributed import ProcessMesh
from mambakit.writing import replacing

_NAME = re.compile(r"best-(\d{8,})\.safetensors")


class Best:
    """The lowest held-out loss of a run.

    Args:
        folder: of the run's checkpoints.
        run: the run's id.
        keep: also keep the weights that learn, on the disk.

    Attributes:
        loss, step: the lowest loss in nats per token, and where it was measured; infinite, 0 before the first.
        since: evaluations since then.
    """

    def __init__(self, folder: Path, run: str, keep: bool):
        self.folder, self.run, self.keep = folder, run, keep
        self.loss, self.step, self.since = math.inf, 0, 0
        self._checkpointed = 0

    def look(self, loss: float, step: int, model: nn.Module, mesh: ProcessMesh) -> bool:
        """Count an evaluation; a lower loss keeps the weights. A collective call. Returns whether it was lower."""
        if not loss < self.loss:
            self.since += 1
            return False
        self.loss, self.step, self.since = loss, step, 0
        if self.keep:
            self._save(model, mesh)
        return True

    def worn_out(self, patience: int) -> bool:
        """Whether ``patience`` evaluations in a row were no better; never for 0."""
        return 0 < patience <= self.since

    def restore(self, model: nn.Module) -> None:
        """Load the kept weights into the whole, unsharded model.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self._path(self.step)
        try:
            kept = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): the weights of the best evaluation are lost; resume=true "
                "export_only=true keep_best=false writes those of the latest checkpoint"
            ) from error
        model.load_state_dict(kept, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"loss": self.loss, "step": self.step, "since": self.since}

    def checkpointed(self) -> None:
        """A checkpoint that knows of `step` is written: its file stays until the next one, and earlier ones go."""
        self._checkpointed = self.step
        self._remove_others()

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Continue from a checkpoint; returns what to tell the user, or ""."""
        self.loss, self.step, self.since = state["loss"], state["step"], state["since"]
        self._checkpointed = self.step
        if not self.keep or not self.step or self._path(self.step).is_file():
            return ""
        lost = self.step
        self.loss, self.step, self.since = math.inf, 0, 0
        return f"the weights of step {lost}, the best so far, are gone: the next evaluation counts as the best"

    def _path(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}.safetensors"

    def _save(self, model: nn.Module, mesh: ProcessMesh) -> None:
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        state = mesh.whole_state(model)
        if not mesh.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Clones: parameters may be views of one allocation.
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if name in learning}
        with replacing(self._path(self.step)) as temporary:
            save_file(tensors, temporary, {"run": self.run, "step": str(self.step), "heldout_loss": repr(self.loss)})
        self._remove_others()

    def _remove_others(self) -> None:
        for path, step in _kept(self.folder, {self.run}):
            if step not in (self.step, self._checkpointed):
                path.unlink()


def remove_best(folder: Path, runs: Collection[str]) -> None:
    """Remove the best weights that these runs left in ``folder``, and nothing else."""
    for path, _ in _kept(folder, runs):
        path.unlink()


def _kept(folder: Path, runs: Collection[str]) -> list[tuple[Path, int]]:
    """(file, step) of the best weights of these runs."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and _run_of(path) in runs:
            found.append((path, int(match[1])))
    return found


def _run_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("run")
    except (OSError, SafetensorError):
        return None
