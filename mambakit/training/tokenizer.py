"""Vocabularies: a byte-level BPE trained on a text, any existing tokenizer, bytes, and nucleotides.

Each is a `tokenizers` tokenizer, so that what is trained with it loads in transformers; bytes and nucleotides are
encoded by table lookup, which gives the same ids.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mambakit.errors import CheckpointError, UsageError
from mambakit.reading import read_json

END = "<|endoftext|>"
# A BPE of a few thousand merges does not change any more with this much text; more only costs time.
_SAMPLE_CHARACTERS = 30_000_000
_NUCLEOTIDES = "ACGTN"
# IUPAC's letters for one of several nucleotides: all are read as N.
_AMBIGUOUS = "RYSWKMBDHV"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what training needs to know of it.

    Attributes:
        tokenizer: its `tokenizers` object.
        end_token: the token that ends every document.
        kind: "text", "bytes" or "nucleotides".
        source: transformers' tokenizer that it was read from, whose other special tokens are kept when it is saved.
    """

    tokenizer: Tokenizer
    end_token: str = END
    kind: str = "text"
    source: Any = None

    def __post_init__(self) -> None:
        if self.tokenizer.token_to_id(self.end_token) is None:
            raise ValueError(
                f"the tokenizer has no {self.end_token!r} token to end documents with; train one, or add the token"
            )

    @property
    def end(self) -> int:
        return _id(self.tokenizer, self.end_token)

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def unknown(self) -> int | None:
        """The id of N, the nucleotide that was not read; None in other vocabularies."""
        return _id(self.tokenizer, "N") if self.kind == "nucleotides" else None

    @property
    def unit(self) -> str:
        """What a document's length is counted in."""
        return {"text": "character", "bytes": "byte", "nucleotides": "nucleotide"}[self.kind]

    @functools.cached_property
    def fingerprint(self) -> str:
        content = "\0".join((self.tokenizer.to_str(), self.end_token, self.kind))
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def complement(self) -> np.ndarray | None:
        """(size,) int32: the id of each nucleotide's partner on the other strand; None in other vocabularies."""
        if self.kind != "nucleotides":
            return None
        table = np.arange(self.size, dtype=np.int32)
        for a, b in ("AT", "CG", "GC", "TA"):
            table[_id(self.tokenizer, a)] = _id(self.tokenizer, b)
        return table

    def characters(self, ids: np.ndarray) -> int:
        """How many characters (bytes, nucleotides) these tokens stand for."""
        return len(self.tokenizer.decode(ids.tolist())) if self.kind == "text" else len(ids)

    def encode(self, pieces: list[str] | list[bytes] | list[str | bytes]) -> list[np.ndarray]:
        """Token ids (int32) of each piece of a document, without the end token.

        Raises:
            ValueError: bytes for a text tokenizer, or a letter that is not a nucleotide's.
        """
        if self.kind == "text":
            texts = [piece for piece in pieces if isinstance(piece, str)]
            if len(texts) < len(pieces):
                raise ValueError('binary documents (WAV, say) are read as bytes; set tokenizer="bytes"')
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
        raw = [np.frombuffer(p.encode() if isinstance(p, str) else p, dtype=np.uint8) for p in pieces]
        if self.kind == "bytes":
            return [piece.astype(np.int32) + 1 for piece in raw]
        return [self._nucleotides(piece) for piece in raw]

    def _nucleotides(self, letters: np.ndarray) -> np.ndarray:
        ids = _nucleotide_table()[letters]
        if (ids == -2).any():
            wrong = bytes(letters[ids == -2][:1]).decode("latin-1")
            raise ValueError(
                f"{wrong!r} is not a nucleotide's letter (A, C, G, T, U, N and IUPAC's {', '.join(_AMBIGUOUS)}); "
                'tokenizer="bytes" reads sequences of any letters'
            )
        return ids[ids >= 0]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
        if self.source is not None:
            self.source.save_pretrained(folder)
        else:
            save_tokenizer(self.tokenizer, folder, self.end_token)


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def make_vocabulary(name: str) -> Vocabulary:
    """The vocabulary that a configuration names.

    Args:
        name: "bytes", "nucleotides", the path of a tokenizer.json, or a folder or hub id of a tokenizer.
    """
    if name == "bytes":
        return Vocabulary(_byte_tokenizer(), kind="bytes")
    if name == "nucleotides":
        return Vocabulary(_nucleotide_tokenizer(), kind="nucleotides")
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UsageError(f"there is no tokenizer {name}; give a tokenizer.json, a folder or a hub id")
        read_json(Path(name))
        try:
            saved = Tokenizer.from_file(name)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise CheckpointError(f"{name} is not a tokenizer ({error}); fetch it again") from error
        return Vocabulary(saved, kind=kind_of(saved))
    from mambakit.models.auto import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"the tokenizer of {name} has no tokenizer.json (a fast tokenizer); convert it to one")
    if loaded.eos_token is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-text (eos) token to end documents with; set one")
    return Vocabulary(tokenizer, loaded.eos_token, kind_of(tokenizer), loaded)


def kind_of(tokenizer: Tokenizer) -> str:
    """ "text", "bytes" or "nucleotides", by a tokenizer's tokens: a trained model's is known again."""
    tokens = tokenizer.get_vocab()
    for kind, same in (("bytes", _byte_tokenizer()), ("nucleotides", _nucleotide_tokenizer())):
        if tokens == same.get_vocab():
            return kind
    return "text"


def _byte_tokenizer() -> Tokenizer:
    """END is 0 and byte b is b + 1. The letters that stand for bytes are GPT-2's, which ByteLevel knows."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab={END: 0} | {letters[b]: b + 1 for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def _nucleotide_tokenizer() -> Tokenizer:
    """END is 0, then A, C, G, T and N. Letters of either case; U is T, any other letter N, and white space nothing."""
    tokens = {END: 0} | {letter: i + 1 for i, letter in enumerate(_NUCLEOTIDES)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="N"))
    swaps = [normalizers.Replace(letter.lower(), letter) for letter in _NUCLEOTIDES]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), ""), *swaps, normalizers.Replace(Regex("[uU]"), "T")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return tokenizer


@functools.cache
def _nucleotide_table() -> np.ndarray:
    """(256,) int32: byte -> id, -1 for white space and -2 for what is no nucleotide."""
    table = np.full(256, -2, dtype=np.int32)
    ids = {letter: i + 1 for i, letter in enumerate(_NUCLEOTIDES)}
    ids |= {"U": ids["T"]} | dict.fromkeys(_AMBIGUOUS, ids["N"])
    for letter, token in ids.items():
        table[ord(letter)] = table[ord(letter.lower())] = token
    table[[ord(c) for c in " \t\r\n"]] = -1
    return table


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over every ``documents``' text, with END as token 0; no text is unrepresentable."""
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one and words apart, as GPT-NeoX's tokenizer has it but for the digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return tokenizer


def _sample(documents: Iterable[str], size: int = 100_000) -> list[str]:
    """An even sample of a text of any length in one pass, in pieces that `tokenizers` can share out over cores.

    Every piece is kept until there are too many; then every second one goes, and only every second is kept from there.
    """
    kept: list[str] = []
    characters, stride = 0, 1
    pieces = (document[start : start + size] for document in documents for start in range(0, len(document), size))
    for index, piece in enumerate(pieces):
        if index % stride == 0:
            kept.append(piece)
            characters += len(piece)
        if characters > 2 * _SAMPLE_CHARACTERS:
            kept, stride = kept[::2], 2 * stride
            characters = sum(map(len, kept))
    return kept


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end_token: str = END) -> None:
    """Write tokenizer.json and tokenizer_config.json; ``end_token`` is the bos, eos and padding token."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_token, eos_token=end_token, pad_token=end_token,
        model_max_length=10**9, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(folder)
