"""Tokenised files on disk: a memory-mapped pair for each input file, so that memory does not grow with them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mambakit.errors import CheckpointError
from mambakit.training.data.audio import wav_rate
from mambakit.training.data.files import FileOptions, Piece, expand, format_of
from mambakit.training.data.pieces import read_pieces
from mambakit.training.tokenizer import Vocabulary

# Characters tokenised in one call: enough work for all cores, and a bound on memory.
_BATCH_CHARACTERS = 4_000_000
_TOKENISED = re.compile(r"([0-9a-f]{20})\.(?:bin|npz)(?:\.[0-9a-f]+\.tmp)?")
_INDEX = ("lengths", "keys", "characters", "bytes")


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Documents of tokens, each ended by the end token, in memory-mapped files or arrays.

    Attributes:
        files: one array of tokens for each file.
        file: (documents,) int32, the file a document lies in.
        starts, lengths: (documents,) int64, where it begins there and how many tokens it has, the end token included.
        keys: (documents,) uint64, a hash of its contents.
        characters, bytes: (documents,) int64, its length in characters (bytes of binary documents) and in bytes.
    """

    files: list[np.ndarray]
    file: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray

    @staticmethod
    def from_arrays(documents: list[np.ndarray]) -> TokenStore:
        """A store of documents in memory; each array ends with the end token."""
        lengths = np.array([len(d) for d in documents], dtype=np.int64)
        keys = [_number(hashlib.blake2b(np.ascontiguousarray(d).tobytes(), digest_size=8)) for d in documents]
        return TokenStore(
            list(documents), np.arange(len(documents), dtype=np.int32), np.zeros_like(lengths), lengths,
            np.array(keys, dtype=np.uint64), lengths - 1, lengths - 1,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the documents' contents, lengths in tokens, and order."""
        content = hashlib.sha256(self.keys.tobytes())
        content.update(self.lengths.tobytes())
        return content.hexdigest()

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, in the store's own dtype."""
        begin, length = int(self.starts[document]), int(self.lengths[document])
        return self.files[self.file[document]][begin + start : begin + (length if stop is None else stop)]

    def select(self, chosen: np.ndarray) -> TokenStore:
        """The documents where ``chosen`` (documents,) is true."""
        parts = (self.file, self.starts, self.lengths, self.keys, self.characters, self.bytes)
        return TokenStore(self.files, *(part[chosen] for part in parts))

    def split(
        self, fraction: float, seed: int, characters: Callable[[np.ndarray], int] = len
    ) -> tuple[TokenStore, TokenStore]:
        """(training, held out): a document's contents and the seed decide, so that its copies stay together.

        Of a single document its end is held out, cut between two tokens.

        Args:
            characters: how many characters some tokens stand for.

        Raises:
            ValueError: one side would be empty.
        """
        if len(self) == 1:
            return self._split_document(fraction, characters)
        mixed = self.keys ^ np.uint64(_number(hashlib.blake2b(str(seed).encode(), digest_size=8)))
        # The keys are uniform; a multiplication makes the choice differ between seeds in more than single bits.
        held = (mixed * np.uint64(0x9E3779B97F4A7C15)) < np.uint64(min(fraction, 1.0) * (2**64 - 2048))
        if held.all() or not held.any():
            raise ValueError(
                f"validation_fraction {fraction} of {len(self)} documents holds out {int(held.sum())}; give "
                "heldout_files, "
                "or split the text into more documents (separator)"
            )
        return self.select(~held), self.select(held)

    def _split_document(
        self, fraction: float, characters: Callable[[np.ndarray], int]
    ) -> tuple[TokenStore, TokenStore]:
        length = int(self.lengths[0])
        held = round(fraction * (length - 1)) + 1  # the end token goes with the end
        if held < 2 or held > length - 2:
            raise ValueError(
                f"validation_fraction {fraction} of one document of {length - 1:,} tokens holds out {held - 1:,} and "
                "leaves "
                f"{length - held:,}; give heldout_files, or more text"
            )
        size = characters(self.read(0, length - held, length - 1))
        bytes_ = round(int(self.bytes[0]) * size / max(1, int(self.characters[0])))
        parts = []
        for start, count, letters, raw in (
            (0, length - held, int(self.characters[0]) - size, int(self.bytes[0]) - bytes_),
            (length - held, held, size, bytes_),
        ):
            key = _number(hashlib.blake2b(f"{int(self.keys[0])} {start} {count}".encode(), digest_size=8))
            integers = (np.array([n], dtype=np.int64) for n in (int(self.starts[0]) + start, count, letters, raw))
            begin, tokens, letter_count, byte_count = integers
            keys = np.array([key], dtype=np.uint64)
            parts.append(TokenStore(self.files, self.file, begin, tokens, keys, letter_count, byte_count))
        return parts[0], parts[1]


def tokenize_files(
    names: list[str], options: FileOptions, vocabulary: Vocabulary, folder: Path,
    progress: Callable[[str, int], None] | None = None,
) -> TokenStore:  # fmt: skip
    """Tokenise files into ``folder``, reusing what is there of the same files, options and vocabulary.

    Args:
        progress: called with a file's name and the tokens written of it.

    Raises:
        ValueError: a file cannot be read, or there are no documents.
    """
    paths = expand(names)
    options = with_rate(paths, options)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint8 if vocabulary.size <= 2**8 else np.uint16 if vocabulary.size <= 2**16 else np.uint32)
    files, indices = [], []
    for path in paths:
        base = folder / _name(path, options, vocabulary)
        if not base.with_suffix(".npz").is_file():
            _write(path, options, vocabulary, base, dtype, progress)
        indices.append(_read_index(base, dtype))
        # An empty file cannot be mapped.
        empty = not len(indices[-1]["lengths"])
        files.append(np.empty(0, dtype) if empty else np.memmap(base.with_suffix(".bin"), dtype, mode="r"))
    lengths, keys, characters, size = (np.concatenate([index[name] for index in indices]) for name in _INDEX)
    if not len(lengths):
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    file = np.repeat(np.arange(len(files), dtype=np.int32), [len(index["lengths"]) for index in indices])
    starts = np.concatenate([np.cumsum(index["lengths"]) - index["lengths"] for index in indices])
    return TokenStore(files, file, starts, lengths, keys, characters, size)


def cache_names(names: list[str], options: FileOptions, vocabulary: Vocabulary) -> set[str]:
    """What `tokenize_files` calls the tokenised files of these."""
    paths = expand(names)
    options = with_rate(paths, options)
    return {_name(path, options, vocabulary) for path in paths}


def remove_tokens(folder: Path, kept: set[str]) -> None:
    """Remove tokenised files but those of these names; what is no tokenised file stays."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _TOKENISED.fullmatch(path.name)
        if match and match[1] not in kept:
            path.unlink()


def _read_index(base: Path, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What the index of a tokenised file says, which must be of the tokens beside it.

    Raises:
        CheckpointError: one of the two files is damaged.
    """
    path = base.with_suffix(".npz")
    try:
        with np.load(path) as index:
            found = {name: index[name] for name in _INDEX}
        size = base.with_suffix(".bin").stat().st_size
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); delete it, and the file is tokenised again"
        ) from error
    if size != int(found["lengths"].sum()) * dtype.itemsize:
        raise CheckpointError(
            f"{base.with_suffix('.bin')} has {size} bytes, which are not the tokens that {path.name} lists; delete "
            "both, and the "
            "file is tokenised again"
        )
    return found


def with_rate(paths: list[Path], options: FileOptions) -> FileOptions:
    """The options with the sample rate that all WAV files must have: that of the first one, where none is given."""
    sounds = [path for path in paths if format_of(path, options) == "wav"]
    if not sounds or options.sample_rate:
        return options
    return dataclasses.replace(options, sample_rate=wav_rate(sounds[0]))


def _name(path: Path, options: FileOptions, vocabulary: Vocabulary) -> str:
    """A name that changes with the file, with how it is read, and with the vocabulary."""
    found = path.stat()
    content = [
        str(path.resolve()),
        found.st_size,
        found.st_mtime_ns,
        dataclasses.asdict(options),
        vocabulary.fingerprint,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _write(
    path: Path, options: FileOptions, vocabulary: Vocabulary, base: Path, dtype: np.dtype,
    progress: Callable[[str, int], None] | None,
) -> None:  # fmt: skip
    """Tokenise one file: the tokens first, then the index, which says that both are complete."""
    index: dict[str, list[int]] = {name: [] for name in _INDEX}
    tokens = characters = size = total = 0
    content = hashlib.blake2b(digest_size=8)
    own = uuid.uuid4().hex  # two runs may fill one cache at a time: the later one replaces what is the same
    temporary = base.with_suffix(f".bin.{own}.tmp")
    with open(temporary, "wb") as out:
        for pieces in _batches(read_pieces(path, options)):
            try:
                encoded = vocabulary.encode([piece.data for piece in pieces])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            for piece, ids in zip(pieces, encoded, strict=True):
                raw = piece.data.encode() if isinstance(piece.data, str) else piece.data
                content.update(raw)
                tokens, characters, size = tokens + len(ids), characters + len(piece.data), size + len(raw)
                out.write(ids.astype(dtype).tobytes())
                if piece.last:
                    out.write(np.array([vocabulary.end], dtype=dtype).tobytes())
                    values = (tokens + 1, _number(content), characters, size)
                    for name, value in zip(_INDEX, values, strict=True):
                        index[name].append(value)
                    total += tokens + 1
                    tokens = characters = size = 0
                    content = hashlib.blake2b(digest_size=8)
            if progress is not None:
                progress(path.name, total + tokens)
    temporary.replace(base.with_suffix(".bin"))
    temporary = base.with_suffix(f".npz.{own}.tmp")
    with open(temporary, "wb") as out:
        arrays = {n: np.array(v, dtype=np.uint64 if n == "keys" else np.int64) for n, v in index.items()}
        np.savez(out, allow_pickle=False, **arrays)
    temporary.replace(base.with_suffix(".npz"))


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _number(content: hashlib.blake2b) -> int:
    return int.from_bytes(content.digest(), "little")
