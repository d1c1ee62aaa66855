"""Text files to rows of tokens: read, split into documents, tokenise, shuffle."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mambakit.training.tokenizer import END

_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
# Long documents are tokenised in pieces, cut at a line end, so that all cores have work.
_PIECE_CHARACTERS = 50_000


def read_documents(files: list[str], separator: str) -> list[str]:
    """The documents of text files (plain, .xz or .gz), split at ``separator``; empty ones are dropped."""
    documents = []
    for name in files:
        path = Path(name)
        opener = _OPENERS.get(path.suffix, open)
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError as error:
            raise ValueError(f"there is no text file {path}") from error
        except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
        documents += [part for part in (text.split(separator) if separator else [text]) if part.strip()]
    if not documents:
        raise ValueError(f"no text in {files}")
    return documents


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Token ids of each document, ended by END."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no {END!r} token to end documents with; train one, or add the token")
    pieces, owner = [], []
    for index, document in enumerate(documents):
        for piece in _cut(document):
            pieces.append(piece)
            owner.append(index)
    parts: list[list[np.ndarray]] = [[] for _ in documents]
    for index, encoding in zip(owner, tokenizer.encode_batch_fast(pieces, add_special_tokens=False), strict=True):
        parts[index].append(np.asarray(encoding.ids, dtype=np.int32))
    return [np.concatenate([*ids, [end]]).astype(np.int32) for ids in parts]


def _cut(document: str) -> Iterator[str]:
    start = 0
    while start < len(document):
        stop = min(len(document), start + _PIECE_CHARACTERS)
        if stop < len(document):
            line_end = document.rfind("\n", start, stop)
            stop = line_end if line_end > start else stop  # the newline goes with what follows it
        yield document[start:stop]
        start = stop


class TokenRows:
    """Rows of ``length`` + 1 tokens from joined documents, in an order that the seed and the step decide.

    Every epoch joins the documents in a new order, cuts from a new offset, and visits the rows in a new order; step s
    of a run is always the same rows, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, documents: list[np.ndarray], length: int, batch_size: int, seed: int, device: torch.device):
        total = sum(map(len, documents))
        self.rows_per_epoch = (total - 1) // length - 1  # one row is given up to the random offset
        if self.rows_per_epoch < batch_size:
            raise ValueError(
                f"the text has {total} tokens: {max(0, self.rows_per_epoch)} rows of {length}, fewer than the batch of "
                f"{batch_size}; give more text, or lower batch_size or sequence_length"
            )
        self.documents, self.length, self.batch_size, self.seed = documents, length, batch_size, seed
        self.device = device
        self.steps_per_epoch = self.rows_per_epoch // batch_size
        self.tokens_per_epoch = total
        self._epoch = -1
        self._offsets = torch.arange(length + 1, device=device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows of step ``step``: tokens (b, length + 1) int64, and (b, length + 1) bool, where a document begins."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        starts = self._starts[at * self.batch_size : (at + 1) * self.batch_size]
        index = starts[:, None] + self._offsets
        return self._tokens[index].long(), self._begins[index]

    def _begin(self, epoch: int) -> None:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.documents))
        tokens = np.concatenate([self.documents[i] for i in order])
        begins = np.zeros(len(tokens), dtype=bool)
        begins[0] = True
        begins[np.cumsum([len(self.documents[i]) for i in order[:-1]], dtype=np.int64)] = True
        offset = int(generator.integers(self.length))
        starts = offset + self.length * generator.permutation(self.rows_per_epoch)
        self._tokens = torch.from_numpy(tokens).to(self.device)
        self._begins = torch.from_numpy(begins).to(self.device)
        self._starts = torch.from_numpy(starts).to(self.device)
        self._epoch = epoch
