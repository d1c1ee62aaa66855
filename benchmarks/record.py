"""The record of a run: docs/benchmarks/*.json.

Every script here writes one with ``--json FILE``; `render.py` makes the documentation's tables of them.

A record says what ran where and what came out:

    machine   public name of the hardware: "NVIDIA H200", "2 x NVIDIA H200", "AMD EPYC 7763, 2 threads"
    date      UTC, YYYY-MM-DD
    commit    of this repository; "-dirty" behind it where files had changes
    command   as typed, from the repository's root, without --json
    software  versions of torch and of what else was compared
    results   a list of rows for each part; a row is a flat object, numbers in SI units where the key names none
    notes     what a reader must know besides
    source    of figures that were entered from a document: file, commit and date of the line

The results of a script have the same keys on every machine, so that a new run's record can take the place of an old one
in `tables`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks"


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the run's record here (docs/benchmarks keeps them)"
    )


def write(path: Path | None, results: dict[str, Any], *, gpus: int, notes: str | None = None, **software: str) -> None:
    """Write the record of this process's run, whole or not at all. Without a path nothing is written. ``gpus``: how
    many the run used, 0 for one on the CPU."""
    if path is None:
        return
    content = {
        "machine": machine(gpus),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "command": command(),
        "software": versions() | software,
        **({"notes": notes} if notes else {}),
        "results": results,
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text(content), encoding="utf-8")
    temporary.replace(path)


def text(content: dict[str, Any]) -> str:
    """JSON, a row to a line."""
    lines = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    return re.sub(r"\{\n\s+([^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", lines) + "\n"


def machine(gpus: int) -> str:
    import torch

    if gpus:
        return (f"{gpus} x " if gpus > 1 else "") + torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """None outside of a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    name = git("rev-parse", "--short", "HEAD")
    return name and name + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def command() -> str:
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    line = shlex.join(["python", str(script), *sys.argv[1:]])
    return re.sub(r" --json[ =]\S+", "", line)


def versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__}
