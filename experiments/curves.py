"""Learning curves of a record: the mean over seeds, and their range, for each model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def draw(source: Path | None, target: Path, parts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Draw one panel for each part of a record that it has.

    Args:
        source: the record (`benchmarks/record.py`); its parts hold rows with "model", "seed" and the two keys.
        parts: name -> the keys of the horizontal and of the vertical axis.

    Raises:
        ValueError: no record is named, or it has none of the parts.
    """
    from matplotlib.figure import Figure

    if source is None:
        raise ValueError("--plot draws the curves of a record: name it with --json")
    results = json.loads(source.read_text(encoding="utf-8"))["results"]
    shown = {name: keys for name, keys in parts.items() if results.get(name)}
    if not shown:
        raise ValueError(f"{source} has none of {', '.join(parts)}")
    figure = Figure(figsize=(5 * len(shown), 3.6), layout="constrained")
    for axes, (name, (x, y)) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        models = dict.fromkeys(row["model"] for row in results[name])
        for number, model in enumerate(models):
            by_place: dict[float, list[float]] = {}
            for row in results[name]:
                if row["model"] == model:
                    by_place.setdefault(row[x], []).append(row[y])
            places = sorted(by_place)
            means = [sum(by_place[p]) / len(by_place[p]) for p in places]
            axes.plot(places, means, color=f"C{number}", label=model)
            low, high = ([bound(by_place[p]) for p in places] for bound in (min, max))
            axes.fill_between(places, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        axes.set(title=name, xlabel=x, ylabel=y, yscale="log" if y == "error" else "linear")
        axes.legend(frameon=False)
    figure.savefig(target, dpi=110)
    return results
