"""How data files are opened: decompressed as their names say, as UTF-8 text, and as JSON lines."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mambakit.errors import UsageError


def _open_zst(path: Path) -> IO[bytes]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f'{path}: .zst files are read with pyarrow; pip install "mambakit[train]"')
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst
}  # fmt: skip
COMPRESSED = tuple(_OPENERS)
"""The suffixes of compressed files."""


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed where its suffix is in `COMPRESSED`. Damage is raised while it is read."""
    opener = _OPENERS.get(path.suffix)
    return open(path, "rb") if opener is None else opener(path)


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """The same as UTF-8 text; ``newline`` as for `open`: None turns line ends into newlines, "" keeps them."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8", newline=newline)


@contextmanager
def named_damage(message: str) -> Iterator[None]:
    """What a damaged or wrongly named file raises while it is read becomes a `UsageError`: "``message``: reason"."""
    try:
        yield
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{message}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise  # the system's
        raise UsageError(f"{message}: {error}") from error  # bz2's and pyarrow's


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every line that is not blank: where it is ("FILE, line N"), and its object.

    Raises:
        UsageError: a line is no JSON object.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
                raise UsageError(f"{where}: not a JSON object ({error})") from error
            if not isinstance(record, dict):
                raise UsageError(f"{where}: not a JSON object, but a {type(record).__name__}")
            yield where, record
