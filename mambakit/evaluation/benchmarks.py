"""BLiMP, LAMBADA and bits per byte, from local files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mambakit.evaluation.files import read_parts, read_records
from mambakit.evaluation.likelihood import log_likelihoods
from mambakit.generation.score import Score, score_text
from mambakit.generation.start_token import start_token

Progress = Callable[[int], None]


@dataclass
class BlimpResult:
    """Accuracy on minimal pairs: how often the acceptable sentence is the likelier one (a tie is wrong)."""

    paradigms: dict[str, float]
    """Of each paradigm (UID)."""
    fields: dict[str, str]
    """The field of linguistics of each paradigm."""
    pairs: int

    @property
    def accuracy(self) -> float:
        """The mean over paradigms, which is what is reported for BLiMP (each has 1,000 pairs)."""
        return sum(self.paradigms.values()) / len(self.paradigms)

    def by_field(self) -> dict[str, float]:
        """The mean over a field's paradigms, field by field."""
        names = sorted(set(self.fields.values()))
        groups = {name: [a for uid, a in self.paradigms.items() if self.fields[uid] == name] for name in names}
        return {name: sum(values) / len(values) for name, values in groups.items()}


def blimp(
    model: Any, tokenizer: Any, files: Iterable[Path], *, limit: int = 0, batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> BlimpResult:  # fmt: skip
    """BLiMP (arXiv 1912.00582): whole sentences by their log-likelihood, each after the end-of-text token.

    Args:
        files: JSON lines with sentence_good, sentence_bad, UID and field (or linguistics_term), as published.
        limit: at most this many pairs of a paradigm; 0: all.
        progress: called with the number of sentences done since the last call.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        for record in read_records(path, ("sentence_good", "sentence_bad", "UID")):
            records.setdefault(record["UID"], []).append(record)
    if not records:
        raise ValueError("the files hold no pairs of sentences")
    first = start_token(tokenizer)
    paradigms, fields, pairs = {}, {}, 0
    for uid, members in records.items():
        members = members[: limit or None]
        sentences = [member[side] for member in members for side in ("sentence_good", "sentence_bad")]
        ids = tokenizer(sentences, add_special_tokens=False).input_ids
        found = log_likelihoods(model, [([first], i) for i in ids], batch_tokens=batch_tokens, progress=progress)
        right = sum(good.log_prob > bad.log_prob for good, bad in zip(found[::2], found[1::2], strict=True))
        paradigms[uid] = right / len(members)
        name = str(members[0].get("field", members[0].get("linguistics_term", "all")))
        fields[uid] = name.replace("/", "_")  # one paradigm is published with the other spelling
        pairs += len(members)
    return BlimpResult(paradigms, fields, pairs)


@dataclass
class LambadaResult:
    """The last word of a passage, given all before it."""

    accuracy: float
    """How often every token of it is the likeliest."""
    perplexity: float
    """exp of the mean negative log-likelihood of a word."""
    passages: int


def lambada(
    model: Any, tokenizer: Any, files: Iterable[Path], *, limit: int = 0, batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> LambadaResult:  # fmt: skip
    """LAMBADA (arXiv 1606.06031) as the harness's lambada_openai: the continuation is a space and the last word.

    Args:
        files: JSON lines with ``text``, a passage.
        limit: at most this many passages; 0: all.
        progress: called with the number of passages done since the last call.
    """
    records = (record["text"] for path in files for record in read_records(path, ("text",)))
    pairs = []
    for text in islice(records, limit or None):
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word:
            raise ValueError(f"the passage {text[:40]!r} has no last word after a space")
        pairs.append(encode_pair(tokenizer, context, " " + word))
    if not pairs:
        raise ValueError("the files hold no passages")
    found = log_likelihoods(model, pairs, batch_tokens=batch_tokens, progress=progress)
    mean = sum(likelihood.log_prob for likelihood in found) / len(found)
    return LambadaResult(sum(f.greedy for f in found) / len(found), math.exp(min(700.0, -mean)), len(found))


@dataclass
class BitsResult:
    """Compression: how many bits a model needs for a text."""

    files: dict[str, Score] = field(default_factory=dict)

    @property
    def total(self) -> Score:
        return sum(self.files.values(), Score())


def bits(
    model: Any, tokenizer: Any, files: Iterable[Path], *, separator: str = "", chunk_size: int = 1024,
    progress: Progress | None = None,
) -> BitsResult:  # fmt: skip
    """Bits per byte and character of text files, each document from its start to its end with the state carried.

    Args:
        separator: the text between the documents of a file, part of neither; without one a file is one document.
        progress: called with the number of characters done since the last call.
    """
    result = BitsResult()
    for path in files:
        total = Score()
        for document in _documents(path, separator):
            done = 0

            def report(characters: int) -> None:
                nonlocal done
                if progress is not None:
                    progress(characters - done)
                done = characters

            total = total + score_text(model, tokenizer, document, chunk_size=chunk_size, progress=report)
        if not total.tokens:
            raise ValueError(f"{path} holds no text")
        result.files[str(path)] = total
    return result


def _documents(path: Path, separator: str) -> Iterable[Any]:
    """The documents of a file: with a separator as strings, else the file as a stream of parts."""
    if not separator:
        return [read_parts(path)]
    return [part for part in "".join(read_parts(path)).split(separator) if part.strip()]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation: tokenised together, cut where the context's own tokens end."""
    ids = lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # noqa: E731
    before, whole = ids(context), ids(context + continuation)
    return whole[: len(before)], whole[len(before) :]
