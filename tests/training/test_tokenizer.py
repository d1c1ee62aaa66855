"""Vocabularies: encoded by table as their tokenizer encodes, saved so that transformers reads them, known again."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

import mambakit
from mambakit.training import tokenizer as module
from mambakit.training.tokenizer import END, Vocabulary, make_vocabulary, save_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bytes", "naïve\n\t 日本 🙂\0" + "".join(map(chr, range(256)))),
        ("nucleotides", "ACGTacgtnNuU RYSWKMBDHV\nac gt\r\n"),
    ],
)
def test_tables_encode_as_the_tokenizer(kind, text, tmp_path):
    vocabulary = make_vocabulary(kind)
    (ids,) = vocabulary.encode([text])
    assert ids.tolist() == vocabulary.tokenizer.encode(text).ids
    vocabulary.save(tmp_path)
    loaded = mambakit.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == ids.tolist()
    assert loaded.eos_token_id == vocabulary.end == 0
    expected = text if kind == "bytes" else "ACGTACGTNNTT" + 10 * "N" + "ACGT"
    assert loaded.decode(ids) == expected
    assert loaded.decode([*ids, 0], skip_special_tokens=True) == expected
    again = make_vocabulary(str(tmp_path))
    assert (again.kind, again.size, again.end) == (kind, vocabulary.size, 0)
    assert make_vocabulary(str(tmp_path / "tokenizer.json")).kind == kind


def test_bytes_of_any_kind():
    raw = bytes(range(256))
    assert make_vocabulary("bytes").encode([raw])[0].tolist() == list(range(1, 257))
    with pytest.raises(ValueError, match='set tokenizer="bytes"'):
        Vocabulary(train_tokenizer(["abc"], 260)).encode([raw])


def test_nucleotides():
    vocabulary = make_vocabulary("nucleotides")
    ids = vocabulary.encode(["ACGTN"])[0]
    assert [vocabulary.tokenizer.id_to_token(i) for i in vocabulary.complement[ids]] == list("TGCAN")
    assert vocabulary.complement[vocabulary.end] == vocabulary.end
    assert vocabulary.unknown == ids[4]
    with pytest.raises(ValueError, match="'E' is not a nucleotide's letter"):
        vocabulary.encode(["MKEL"])


def test_an_existing_tokenizer(tmp_path):
    save_tokenizer(train_tokenizer(["the cat sat " * 20], 280), tmp_path)
    vocabulary = make_vocabulary(str(tmp_path))
    assert (vocabulary.kind, vocabulary.end_token) == ("text", END)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key in ("eos_token", "bos_token", "pad_token"):
        config.pop(key)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no end-of-text .eos. token"):
        make_vocabulary(str(tmp_path))
    with pytest.raises(ValueError, match="there is no tokenizer no/such.json"):
        make_vocabulary("no/such.json")
    with pytest.raises(ValueError, match="neither a folder here nor a hub id"):
        make_vocabulary("no/such/folder/here")


def test_the_sample_to_train_on_is_even_and_bounded(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE_CHARACTERS", 1000)
    pieces = list(module._sample((f"{i:010}" for i in range(1000)), size=10))
    assert 1000 <= sum(map(len, pieces)) <= 2000
    numbers = [int(p) for p in pieces]
    assert numbers[0] == 0
    assert len({b - a for a, b in pairwise(numbers)}) == 1
    assert numbers[-1] > 950
    assert list(module._sample(["abc", "de"], size=2)) == ["ab", "c", "de"]
