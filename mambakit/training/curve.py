"""The loss curve: a line of text in any terminal, and a picture where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from mambakit.output import say

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 60) -> str:
    """``values`` as ``width`` bars, each the mean of an equal part."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((m - low) * scale)] for m in means)


def write_curve(history: list[dict[str, Any]], path: Path, console: Console) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        say(console, 'no picture of the loss curve: install it with pip install "mambakit[train]"')
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    seen = [r for r in history if r["loss"] is not None]
    axes.plot([r["step"] for r in seen], [r["loss"] for r in seen], label="training", linewidth=0.8)
    held = [r for r in history if "heldout_loss" in r]
    if held:
        axes.plot([r["step"] for r in held], [r["heldout_loss"] for r in held], label="held out", marker=".")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    temporary.replace(path)
    pyplot.close(figure)
