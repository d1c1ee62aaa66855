"""Local files of evaluation data: JSON lines or text, plain or compressed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError
from mambakit.opening import named_damage, open_text, read_json_lines
from mambakit.reading import require_unicode


def read_records(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file.

    Raises:
        UsageError: the file is missing or damaged, or a line is no object with text under each of ``keys``.
    """
    _require_file(path)
    with named_damage(f"{path} cannot be read as UTF-8 text"):
        for where, record in read_json_lines(path):
            for key in keys:
                if key not in record:
                    raise UsageError(f"{where}: no {key!r}; expected {', '.join(keys)}")
                if not isinstance(record[key], str) or not record[key].strip():
                    raise UsageError(f"{where}: {key} is {str(record[key])[:40]!r}; it must be text")
                require_unicode(record[key], f"{where}: {key}")
            yield record


def read_parts(path: Path, size: int = 1 << 16) -> Iterator[str]:
    """A text file's contents, ``size`` characters at a time, line ends as they are."""
    _require_file(path)
    with named_damage(f"{path} cannot be read as UTF-8 text"), open_text(path, newline="") as file:
        while part := file.read(size):
            yield part


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
