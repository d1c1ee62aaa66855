"""Documents of text: plain files, JSON lines, Parquet columns."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from mambakit.errors import UsageError
from mambakit.opening import open_text, read_json_lines
from mambakit.reading import require_unicode
from mambakit.training.data.files import Piece

# Long documents are split at line ends: this bounds memory, and gives work to all cores.
PIECE_CHARACTERS = 50_000
_READ_CHARACTERS = 1 << 20


def read_text(path: Path, separator: str) -> Iterator[Piece]:
    """The documents of a UTF-8 text file, split at ``separator`` (none: the file is one); blank ones are dropped."""
    rest, begun = "", False
    with open_text(path) as file:
        while chunk := file.read(_READ_CHARACTERS):
            *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
            for document in whole:
                if begun or document.strip():
                    yield from _document(document)
                begun = False
            # Cut no further than where a separator might begin.
            while len(rest) - len(separator) > PIECE_CHARACTERS:
                piece = _first_piece(rest)
                if begun or piece.strip():
                    yield Piece(piece, False)
                    begun = True
                rest = rest[len(piece) :]
    if begun or rest.strip():
        yield from _document(rest)


def read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """A document for every line: the string under ``field`` of the line's object."""
    for where, record in read_json_lines(path):
        text = record.get(field)
        if not isinstance(text, str):
            raise UsageError(f"{where}: no text under {field!r} (it has: {', '.join(record)}); set text_field")
        if text.strip():
            require_unicode(text, f"{where}: {field}")
            yield from _document(text)


def read_parquet(path: Path, field: str) -> Iterator[Piece]:
    """A document for every row: the column ``field``, of strings or bytes; missing values are dropped."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f'{path}: Parquet files are read with pyarrow; pip install "mambakit[train]"')
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file, or damaged ({error})") from error
    with file:
        columns = file.schema_arrow
        if field not in columns.names:
            raise ValueError(f"{path} has no column {field!r} (it has: {', '.join(columns.names)}); set text_field")
        kind = columns.field(field).type
        if str(kind) not in ("string", "large_string", "binary", "large_binary"):
            raise ValueError(f"{path}: column {field!r} holds {kind}, not strings; set text_field to the one that does")
        for batch in file.iter_batches(batch_size=64, columns=[field]):
            for value in batch.column(0):
                document = value.as_py()
                if document is not None and document.strip():
                    yield from _document(document) if isinstance(document, str) else (Piece(document, True),)


def _document(text: str) -> Iterator[Piece]:
    while len(text) > PIECE_CHARACTERS:
        piece = _first_piece(text)
        yield Piece(piece, False)
        text = text[len(piece) :]
    yield Piece(text, True)


def _first_piece(text: str) -> str:
    """The beginning of a text, up to a line end where there is one; the newline goes with what follows it."""
    line_end = text.rfind("\n", 1, PIECE_CHARACTERS)
    return text[: line_end if line_end > 0 else PIECE_CHARACTERS]
