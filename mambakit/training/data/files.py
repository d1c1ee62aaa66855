"""Which files, of which format, and how they are opened."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

from mambakit.errors import UsageError

_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".fa": "fasta", ".fasta": "fasta", ".fna": "fasta", ".ffn": "fasta", ".wav": "wav", ".wave": "wav",
}  # fmt: skip
# Errors of a stream that is not what its name says, or ends too early.
DAMAGED = (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


class Piece(NamedTuple):
    """A stretch of a document: text, or bytes (audio codes). Documents of any length pass in pieces of bounded size."""

    data: str | bytes
    last: bool
    """The document ends with it."""


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """How files are read; the fields are those of `TrainConfig`."""

    format: str = "auto"
    text_field: str = "text"
    separator: str = ""
    ambiguous: str = "mask"
    sample_rate: int = 0


def expand(names: list[str]) -> list[Path]:
    """The files that paths, folders and patterns stand for: in the order given, sorted within a folder or pattern.

    Raises:
        ValueError: a file is not there, a pattern matches none, or a folder holds none of a known name.
    """
    found: list[Path] = []
    for name in names:
        if not name.strip():
            raise UsageError(f"a file's name is empty ({name!r}); remove it (is a variable not set?)")
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in _FORMATS)
            if not inside:
                raise ValueError(f"the folder {path} holds no file named {', '.join(_FORMATS)} (or with .gz, .xz)")
            found += inside
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not matches:
                raise ValueError(f"no file matches {name}")
            found += matches
        else:
            raise ValueError(f"there is no file {path}")
    return found


def format_of(path: Path, options: FileOptions) -> str:
    """The format of a file: as the options say, else by its name; a name that says nothing is a text's."""
    return _FORMATS.get(_suffix(path), "text") if options.format == "auto" else options.format


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix in _COMPRESSED else path.suffix.lower()


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed where its name ends in .gz or .xz."""
    opener = _COMPRESSED.get(path.suffix)
    return open(path, "rb") if opener is None else opener(path, "rb")


def open_text(path: Path) -> IO[str]:
    return _COMPRESSED.get(path.suffix, open)(path, "rt", encoding="utf-8")
