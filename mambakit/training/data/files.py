"""Which files are read, and in which format."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import NamedTuple

from mambakit.errors import UsageError
from mambakit.opening import COMPRESSED

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".fa": "fasta", ".fasta": "fasta", ".fna": "fasta", ".ffn": "fasta", ".wav": "wav", ".wave": "wav",
}  # fmt: skip


class Piece(NamedTuple):
    """Part of a document: text, or bytes (audio codes). Documents of any length are read in pieces of bounded size."""

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
                raise ValueError(
                    f"the folder {path} holds no file named {', '.join(_FORMATS)} (or with {', '.join(COMPRESSED)})"
                )
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
    """The format of a file: the options', else by the name's suffix; text where that is unknown."""
    return _FORMATS.get(_suffix(path), "text") if options.format == "auto" else options.format


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix in COMPRESSED else path.suffix.lower()
