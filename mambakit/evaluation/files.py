"""Local files of evaluation data: JSON lines or text, plain or compressed."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mambakit.errors import UsageError
from mambakit.reading import require_unicode

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 text file, decompressed where its name ends in .gz or .xz.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="")


def read_records(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file.

    Raises:
        ValueError: a line is no object, or has not all of ``keys``, each of them text.
    """
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
                    raise UsageError(f"{path}, line {number}: not a JSON object ({error})") from error
                missing = [key for key in keys if not isinstance(record, dict) or key not in record]
                if missing:
                    raise UsageError(f"{path}, line {number}: no {missing[0]!r}; expected {', '.join(keys)}")
                for key in keys:
                    if not isinstance(record[key], str) or not record[key].strip():
                        raise UsageError(f"{path}, line {number}: {key} is {str(record[key])[:40]!r}; it must be text")
                    require_unicode(record[key], f"{path}, line {number}: {key}")
                yield record
    except _DAMAGED as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_parts(path: Path, size: int = 1 << 16) -> Iterator[str]:
    """A text file's contents, ``size`` characters at a time."""
    try:
        with open_text(path) as file:
            while part := file.read(size):
                yield part
    except _DAMAGED as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from error
