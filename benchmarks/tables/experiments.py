"""Tables of experiments with several seeds."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from benchmarks.tables.records import Content, Records, Row, select


def spread(rows: list[Row], key: str, digits: int) -> str:
    """Mean (lowest to highest) over seeds."""
    values = [float(row[key]) for row in rows]  # type: ignore[arg-type]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def state_tuning(task: str) -> Callable[[Records], Content]:
    def table(records: Records) -> Content:
        name = f"2026-11-29-h200-state-{task}"
        found = records.rows(name, "summary")
        places = [key for key in found[0] if str(key).startswith("bits ")]
        rows = []
        for model in dict.fromkeys(row["model"] for row in found):
            same = select(found, model=model)
            cells = [spread(same, "bits", 3), *(f"{fmean(r[p] for r in same):.2f}" for p in places)]
            rows.append([model, f"{same[0]['learned']:,}", *cells, str(len(same))])
        return ["", "learned numbers", "bits", *(f"tokens {str(p)[5:]}" for p in places), "seeds"], rows

    return table


def recurrent(records: Records) -> Content:
    name = "2026-11-29-xeon-recurrent"
    found, names = records.rows(name, "summary"), {"series": "series: error", "cartpole": "cartpole: steps of 500"}
    rows = []
    for task in names:
        for model in dict.fromkeys(row["model"] for row in found):
            same = select(found, task=task, model=model)
            digits = 4 if task == "series" else 0
            rows.append(
                [
                    names[task], model, f"{same[0]['parameters']:,}", f"{same[0]['rate']:g}",
                    spread(same, "at the end", digits), spread(same, "seconds", 0), str(len(same)),
                ]
            )  # fmt: skip
    return ["", "model", "parameters", "rate", "at the end", "seconds", "seeds"], rows
