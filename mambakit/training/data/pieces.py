"""The documents of a file of any format, as pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mambakit.opening import named_damage
from mambakit.training.data import audio, fasta, text
from mambakit.training.data.files import FileOptions, Piece, format_of


def read_pieces(path: Path, options: FileOptions) -> Iterator[Piece]:
    """The documents of one file, in order, as pieces; memory does not grow with the file or its documents.

    Raises:
        ValueError: the file is not of its format, or damaged.
    """
    kind = format_of(path, options)
    with named_damage(f"{path} cannot be read as {kind}, in UTF-8 where it is text"):
        if kind == "text":
            yield from text.read_text(path, options.separator)
        elif kind == "jsonl":
            yield from text.read_jsonl(path, options.text_field)
        elif kind == "parquet":
            yield from text.read_parquet(path, options.text_field)
        elif kind == "fasta":
            yield from fasta.read_fasta(path, options.ambiguous == "split")
        else:
            yield from audio.read_wav(path, options.sample_rate)
