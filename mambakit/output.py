"""Printing for people: text of users is never read as markup, and control characters are escaped.

On a terminal, rows are a table, or one field to a line where a table would not fit. In a pipe they are plain lines with
tabs between fields.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mambakit.errors import MambakitError

if TYPE_CHECKING:
    from rich.console import Console

# Characters that move the cursor, end a line, turn the direction of what follows, or cannot be encoded.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|inf|nan)( ?%)?", re.IGNORECASE)
# A text column is folded no narrower than this.
_FOLDED = 12
# Errors of other packages may be pages long: the rest is cut.
_LONGEST_ERROR = 600


def printable(text: str) -> str:
    """``text`` in one line, control characters written as Python escapes them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def terminal(stderr: bool = False) -> Console:
    """A console that prints square brackets and colons as they are."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print text: a terminal wraps long lines, a pipe gets them whole."""
    from rich.text import Text

    lines = "\n".join(printable(line) for line in text.split("\n"))
    console.print(Text(lines, style=style), soft_wrap=True)


def literal(text: str) -> Any:
    """``text`` for rich's status lines, which read strings as markup."""
    from rich.text import Text

    return Text(printable(text))


def description_column() -> Any:
    """A progress bar's column for `description`, which may be a file's name."""
    from rich.progress import TextColumn

    class Description(TextColumn):
        def render(self, task: Any) -> Any:
            return literal(task.description)

    return Description("", markup=False)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", console: Console | None = None
) -> None:
    """Print ``rows`` of cells under ``columns`` (empty names: no header). Numbers are never broken over lines.

    Args:
        title: a line above it, on a terminal.
        console: standard output when None.
    """
    console = console or terminal()
    cells = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in ([list(columns)] if any(columns) else []) + cells:
            print("\t".join(row), file=console.file)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    fixed = [all(_NUMBER.fullmatch(row[i]) for row in cells if row[i]) for i in range(len(columns))]
    least = [width if whole else min(width, _FOLDED) for width, whole in zip(widths, fixed, strict=True)]
    if sum(least) + 3 * len(columns) + 1 > console.width:  # a border and a space on either side of each column
        _print_records(columns, cells, title, console)
    else:
        _print_table(columns, cells, fixed, title, console)


def _print_table(
    columns: Sequence[str], cells: list[list[str]], fixed: list[bool], title: str, console: Console
) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title) if title else None, title_justify="left", show_header=any(columns))
    for name, whole in zip(columns, fixed, strict=True):
        grid.add_column(Text(name), no_wrap=whole, overflow="fold")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)


def _print_records(columns: Sequence[str], cells: list[list[str]], title: str, console: Console) -> None:
    if title:
        say(console, title)
    for number, row in enumerate(cells):
        if number and any(columns):
            console.print()
        if any(columns):
            for name, cell in zip(columns, row, strict=True):
                say(console, f"{name}: {cell}")
        else:
            say(console, ": ".join(row))


def error_line(error: BaseException) -> str:
    """An error in one line: its message, its type where that says more, and how to see the traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, MambakitError):
        return printable(text)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    elif not text or not isinstance(error, (ValueError, TypeError, OSError, NotImplementedError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(text) > _LONGEST_ERROR:
        text = text[:_LONGEST_ERROR] + " ..."
    return f"{printable(text)} (--debug shows the traceback)"
