"""Where the metrics of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mambakit.quoting import brief


class Tracker(Protocol):
    """What a run does with a tracker."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``out/tensorboard``; those of steps that a resumed run repeats are dropped."""

    def __init__(self, out: Path, run: str, project: str, config: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb with this run's id: a resumed one goes on in the same curves."""

    def __init__(self, out: Path, run: str, project: str, config: dict[str, Any], step: int):
        import wandb

        self._run = wandb.init(
            project=project, name=out.name, id=run, dir=str(out), config=config, resume="allow",
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its own folder of this machine; `trackio show` draws it."""

    def __init__(self, out: Path, run: str, project: str, config: dict[str, Any], step: int):
        import trackio

        name = f"{out.name}-{run[:6]}"  # two folders of one name are two runs
        self._trackio = trackio
        trackio.init(project=project, name=name, config=config, resume="allow", embed=False)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._trackio.log(metrics, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def check_trackers(names: Sequence[str]) -> None:
    """Raises a ValueError for an unknown tracker, one that is named twice, and one that is not installed."""
    for number, name in enumerate(names):
        if name not in TRACKERS:
            raise ValueError(f"report_to names {brief(name)}; choose among {', '.join(TRACKERS)}")
        if name in names[:number]:
            raise ValueError(f"report_to names {name} twice; drop one")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to names {name}, which is not installed: pip install {name}")


def open_trackers(
    names: Sequence[str], out: Path, run: str, project: str, config: dict[str, Any], step: int
) -> list[Tracker]:
    """The trackers of a run.

    Args:
        out: the run's folder.
        run: the run's id, the same when it is resumed.
        config: its fields, for the trackers to show.
        step: the step that the run starts from.
    """
    return [TRACKERS[name](out, run, project, config, step) for name in names]
