"""Sequences of FASTA files: every record a document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mambakit.opening import open_text
from mambakit.training.data.files import Piece

_PIECE_LETTERS = 1 << 20
# N and IUPAC's letters for one of several nucleotides.
_UNREAD = re.compile("[NRYSWKMBDHVnryswkmbdhv]+")


def read_fasta(path: Path, split_unread: bool) -> Iterator[Piece]:
    """The records of a FASTA file, letters as they stand.

    Args:
        split_unread: end a document where letters were not read (N); the runs themselves are dropped.

    Raises:
        ValueError: the file does not begin with a record.
    """
    begun = False  # a piece of the current document is out
    for letters, record_ends in _records(path):
        parts = _UNREAD.split(letters) if split_unread else [letters]
        for index, part in enumerate(parts):
            last = record_ends or index < len(parts) - 1
            if part or (begun and last):
                yield Piece(part, last)
                begun = not last


def _records(path: Path) -> Iterator[tuple[str, bool]]:
    """(letters, whether the record ends), a bounded number of letters at a time."""
    lines: list[str] = []
    size, inside = 0, False
    with open_text(path) as file:
        for line in file:
            if line.startswith(">"):
                if inside:
                    yield "".join(lines), True
                lines, size, inside = [], 0, True
            elif line.strip() and not line.startswith(";"):
                if not inside:
                    raise ValueError(f"{path} is not FASTA: {line[:40].strip()!r} stands before the first '>' line")
                lines.append(line.strip())
                size += len(lines[-1])
                if size >= _PIECE_LETTERS:
                    yield "".join(lines), False
                    lines, size = [], 0
    if inside:
        yield "".join(lines), True
