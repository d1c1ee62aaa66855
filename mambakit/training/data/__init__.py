"""Files of any format to rows of tokens: read in parts, tokenised once to disk, packed to the last token."""

from mambakit.training.data.files import FileOptions, Piece, expand
from mambakit.training.data.pieces import read_pieces
from mambakit.training.data.rows import ShuffledRows, StatefulRows
from mambakit.training.data.store import TokenStore, tokenize_files

__all__ = [
    "FileOptions",
    "Piece",
    "ShuffledRows",
    "StatefulRows",
    "TokenStore",
    "expand",
    "read_pieces",
    "tokenize_files",
]
