"""Records as tables read them, and how cells are written."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from typing import Any

from benchmarks.record import FOLDER

Row = dict[str, Any]
Content = tuple[list[str], list[list[str]]]
NOTHING: Row = {}


class Records:
    """The records that a table reads, in the order in which it asks for them."""

    def __init__(self) -> None:
        self.used: list[str] = []

    def load(self, name: str) -> dict[str, Any]:
        return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))

    def rows(self, name: str, part: str, /, **where: object) -> list[Row]:
        if name not in self.used:
            self.used.append(name)
        return select(self.load(name)["results"][part], **where)

    def row(self, name: str, part: str, /, **where: object) -> Row:
        """The one row that matches, or an empty one."""
        found = self.rows(name, part, **where)
        assert len(found) < 2, f"{name}/{part}: {len(found)} rows match {where}"
        return found[0] if found else NOTHING

    def goal(self, part: str, /, **where: object) -> Row:
        """Goals are no run: they have no machine and no line below the table."""
        found = select(self.load("goals")[part], **where)
        return found[0] if found else NOTHING


def latest(kind: str) -> str:
    """The name of the newest record ``<date>-<machine>-<kind>``.

    Raises:
        FileNotFoundError: there is none yet.
    """
    names = kept(kind)
    if not names:
        raise FileNotFoundError(f"docs/benchmarks has no record *-{kind}.json; measure one first")
    return names[-1]


def kept(kind: str) -> list[str]:
    """The names of all records ``<date>-<machine>-<kind>``, oldest first."""
    return sorted(path.stem for path in FOLDER.glob(f"*-{kind}.json"))


def select(rows: Iterable[Row], /, **where: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def cell(template: str, row: Row, **scaled: float) -> str:
    """The template filled in, or nothing where the row lacks one of its fields. ``scaled``: a field times this."""
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and row.get(field) is None:
            return ""
    return template.format(**{key: value * scaled[key] if key in scaled else value for key, value in row.items()})


def plain(value: object) -> str:
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


def shape(row: Row) -> str:
    return ", ".join(str(size) for size in row["shape"])


def ratio(row: Row, mine: float, theirs: float | None) -> str:
    """How many times as fast, of unrounded times where the record has it; 2.5, a goal of the kernels, is never reached
    by rounding."""
    value = row.get("ratio") or (theirs / mine if theirs else None)
    if value is None:
        return ""
    return f"{value:.3f}" if value < 2.5 and f"{value:.2f}" == "2.50" else f"{value:.2f}"


def milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}"
