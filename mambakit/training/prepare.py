"""From a configuration's files to a vocabulary and tokenised documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mambakit.output import literal
from mambakit.training.config import TrainConfig
from mambakit.training.data import FileOptions, TokenStore, expand, read_pieces, tokenize_files
from mambakit.training.data.files import format_of
from mambakit.training.data.store import cache_names, with_rate
from mambakit.training.tokenizer import Vocabulary, make_vocabulary, train_tokenizer


class Prepared(NamedTuple):
    vocabulary: Vocabulary
    train: TokenStore
    heldout: TokenStore | None
    cached: set[str]
    """Names of the tokenised files."""
    sample_rate: int = 0
    """Samples a second of sounds; 0 for anything else."""


def prepare(config: TrainConfig, out: Path, console: Console, vocabulary: Vocabulary | None = None) -> Prepared:
    """Choose or train the vocabulary and tokenise the files; with ``vocabulary`` another process has done both.

    Nothing in ``out`` changes but its cache of tokens.
    """
    options = FileOptions(config.format, config.text_field, config.separator, config.ambiguous, config.sample_rate)
    options = with_rate(expand(config.train_files), options)  # held-out sounds must have it too
    with console.status(literal("reading")) as status:
        vocabulary = vocabulary or _vocabulary(config, options, out)
        if config.reverse_complement and vocabulary.kind != "nucleotides":
            raise ValueError(
                f'reverse_complement reads DNA, but the tokens are {vocabulary.kind}; tokenizer="nucleotides"'
            )
        cache = Path(config.token_cache) if config.token_cache else out / "tokens"

        def progress(name: str, tokens: int) -> None:
            status.update(literal(f"tokenising {name}: {tokens:,} tokens"))

        train = tokenize_files(config.train_files, options, vocabulary, cache, progress)
        heldout = None
        if config.heldout_files:
            heldout = tokenize_files(config.heldout_files, options, vocabulary, cache, progress)
        elif config.validation_fraction:
            train, heldout = train.split(config.validation_fraction, config.seed, vocabulary.characters)
        cached = cache_names(config.train_files, options, vocabulary)
        if config.heldout_files:
            cached |= cache_names(config.heldout_files, options, vocabulary)
    return Prepared(vocabulary, train, heldout, cached, _rate_of(config, options))


def _rate_of(config: TrainConfig, options: FileOptions) -> int:
    formats = {format_of(path, options) for path in expand(config.train_files)}
    return options.sample_rate if formats == {"wav"} else 0


def _vocabulary(config: TrainConfig, options: FileOptions, out: Path) -> Vocabulary:
    if config.tokenizer or config.init_from:
        return make_vocabulary(config.tokenizer or config.init_from)
    files = expand(config.train_files)
    formats = {format_of(path, options) for path in files}
    for kind, name in (("fasta", "nucleotides"), ("wav", "bytes")):
        if formats == {kind}:
            return make_vocabulary(name)
        if kind in formats:
            raise ValueError(f"train_files mix {' and '.join(sorted(formats))}; name the tokenizer that reads them all")
    if config.resume and all((out / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return make_vocabulary(str(out))
    return Vocabulary(train_tokenizer(_texts(files, options), config.vocab_size))


def _texts(files: list[Path], options: FileOptions) -> Iterator[str]:
    for path in files:
        for piece in read_pieces(path, options):
            if not isinstance(piece.data, str):
                raise ValueError(f'{path} holds binary documents, which a BPE cannot read; set tokenizer="bytes"')
            yield piece.data
