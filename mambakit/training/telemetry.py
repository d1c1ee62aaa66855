"""Records of a run: the progress bar, metrics.jsonl, trackers, and environment.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

from mambakit.output import description_column
from mambakit.training.trackers import Tracker
from mambakit.writing import replace_text

_PACKAGES = ("mambakit", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "peft", "pyarrow")


class Telemetry:
    """The records of a run. Use as a context manager around the loop.

    Args:
        out: the run's folder.
        console: where the bar is drawn.
        trackers: what else is given the metrics; closed at the end.
        step: the step that the run starts from; later records, of a run that was interrupted, are dropped.

    Attributes:
        history: every record of the run, those before a resumption included.
    """

    def __init__(self, out: Path, console: Console, trackers: list[Tracker], step: int):
        self.path = out / "metrics.jsonl"
        self.history = _records_until(self.path, step) if step else []
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in self.history))
        self._trackers = trackers
        self._bar = Progress(
            SpinnerColumn(), BarColumn(), description_column(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=1.0)

    def __enter__(self) -> Telemetry:
        self._file = open(self.path, "a", encoding="utf-8")
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def write(self, record: dict[str, Any], progress: float) -> None:
        """Write a record, and show it; ``progress`` (0 to 1) is the fraction of the run that is done."""
        self.history.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        metrics = {name: value for name, value in record.items() if name != "step" and value is not None}
        for tracker in self._trackers:
            tracker.write(record["step"], metrics)
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
        mfu = f", {record['mfu']:.1%} MFU" if "mfu" in record else ""
        text = f"step {record['step']}, loss {loss}, {record['tokens_per_second']:,.0f} tokens/s{mfu}"
        self._bar.update(self._task, completed=progress, description=text)


def record_environment(out: Path, device: torch.device) -> None:
    """Write environment.json: versions, device, and how the run was called."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    record = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "versions": versions,
    }
    replace_text(out / "environment.json", json.dumps(record, indent=2))


def _records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records up to ``step``. The last line may be cut short: the process may have died while it wrote."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            if record["step"] <= step:
                records.append(record)
    return records
