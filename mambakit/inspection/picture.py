"""The picture of an inspection, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from mambakit.errors import UsageError
from mambakit.inspection.summary import Summary
from mambakit.output import printable

# Tokens that have room for their text under the bars.
_LABELLED = 60


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('a picture is drawn with matplotlib: pip install "mambakit[train]"; or write an HTML page')


def draw(found: Summary, path: str | os.PathLike, model: str, dpi: int = 110) -> None:
    """Write a PNG: surprise, the three maps, half-lives, and the attention of each chosen layer.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    layers, length = list(found.attention), len(found.pieces)
    across = 4
    down = -(-len(layers) // across)
    figure = Figure(figsize=(14, 15 + 3.4 * down), layout="constrained")
    figure.suptitle(f"{printable(model)}: {found.words}", fontsize=12)
    grid = figure.add_gridspec(5 + down, across, height_ratios=[2.2, 2.5, 2.5, 2.5, 3.4, *[3.4] * down])
    axes = figure.add_subplot(grid[0, :])
    axes.bar(range(length), found.surprise, width=0.9 if length <= _LABELLED else 1.0, color="C3")
    axes.set(title="surprise (nats)", xlim=(-0.5, length - 0.5))
    if length <= _LABELLED:
        labels = ["start", *(_label(piece) for piece in found.pieces[1:])]
        axes.set_xticks(range(length), labels, rotation=90, fontsize=8, family="monospace", parse_math=False)
    for row, map in enumerate(found.maps.values(), 1):
        axes = figure.add_subplot(grid[row, :])
        axes.imshow(map.values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        scale = f"{map.low:g} (pale) to {map.high:g}" + (", logarithmic" if map.log else "")
        ticks = range(0, len(map.values), -(-len(map.values) // 6))
        axes.set(title=f"{map.title}: {scale}", ylabel="layer", xticks=[], yticks=ticks)
    _half_lives(figure.add_subplot(grid[4, :]), found.half_life)
    for number, layer in enumerate(layers):
        axes = figure.add_subplot(grid[5 + number // across, number % across])
        axes.imshow(found.attention[layer].values.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        channels = len(found.channels[layer])
        axes.set(title=f"attention, layer {layer}, {channels} channel{'s' * (channels > 1)}", xticks=[], yticks=[])
    figure.savefig(path, dpi=dpi, format="png")


def _half_lives(axes: Any, quantiles: list[list[float]]) -> None:
    boxes = [
        {"whislo": q[0], "q1": q[1], "med": q[2], "q3": q[3], "whishi": q[4], "fliers": [q[5]], "label": str(i)}
        for i, q in enumerate(quantiles)
    ]
    axes.bxp(boxes, flierprops={"marker": ".", "markeredgecolor": "C3"}, medianprops={"color": "C0"})
    axes.set(title="half-lives of all states (tokens); a dot for the longest", yscale="log", xlabel="layer")
    axes.grid(axis="y", alpha=0.3)


def _label(piece: str) -> str:
    shown = printable(piece).replace(" ", "␣")
    return shown if len(shown) <= 14 else shown[:13] + "…"
