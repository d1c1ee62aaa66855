"""Data: every format to documents, documents to tokens on disk."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import wave

import numpy as np
import pytest

from mambakit.training.data import (
    FileOptions,
    TokenStore,
    expand,
    read_pieces,
    tokenize_files,
)
from mambakit.training.data.audio import mu_law_decode, mu_law_encode
from mambakit.training.data.store import with_rate
from mambakit.training.tokenizer import Vocabulary, make_vocabulary, train_tokenizer


def documents(path, **options) -> list:
    found, parts = [], []
    for data, last in read_pieces(path, FileOptions(**options)):
        parts.append(data)
        if last:
            found.append(parts[0][:0].join(parts))
            parts = []
    assert not parts, "the last document ends"
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def test_text_is_split_and_decompressed(tmp_path):
    text = "one two|three — naïve||  \n|four\n"
    plain, gz, xz, bz2_ = (tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt.xz", "d.txt.bz2"))
    plain.write_text(text, encoding="utf-8")
    gz.write_bytes(gzip.compress(text.encode()))
    xz.write_bytes(lzma.compress(text.encode()))
    bz2_.write_bytes(bz2.compress(text.encode()))
    for path in (plain, gz, xz, bz2_):
        assert documents(path, separator="|") == ["one two", "three — naïve", "four\n"]
    assert documents(plain) == [text]


def test_long_documents_pass_in_pieces_and_lose_nothing(tmp_path):
    """Separators anywhere, across the reader's own boundaries too; lines, and none."""
    source = random.Random(0)
    whole = ["".join(source.choices("abc \n", k=k)) + "x" for k in (10, 120_000, 1 << 20, 3, 70_000)]
    whole.append("y" * 200_000)
    path = tmp_path / "long.txt"
    path.write_text("<end>".join(whole), encoding="utf-8")
    assert documents(path, separator="<end>") == whole
    sizes = [len(piece.data) for piece in read_pieces(path, FileOptions(separator="<end>"))]
    assert max(sizes) <= 50_000


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"body": "one\ntwo", "n": 1}, {"body": " "}, {"body": "naïve 日本"}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    assert documents(path, text_field="body") == ["one\ntwo", "naïve 日本"]
    with pytest.raises(ValueError, match=r"line 1: no text under 'text' \(it has: body, n\)"):
        documents(path)
    path.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        documents(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", None, "naïve", ""], "raw": [b"\0\xff", b"x", b"y", b"z"], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert documents(path) == ["one", "naïve"]
    assert documents(path, text_field="raw") == [b"\0\xff", b"x", b"y", b"z"]
    for field, message in (("body", "no column 'body' .it has: text, raw, n"), ("n", "holds int64, not strings")):
        with pytest.raises(ValueError, match=message):
            documents(path, text_field=field)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a Parquet file"):
        documents(path)


def test_fasta(tmp_path):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(b">one first\nACGT\nacgtn\n\n>two\nNNNN\nGGNRNCC\nNN\n>empty\n>three\nTT"))
    assert documents(path) == ["ACGTacgtn", "NNNNGGNRNCCNN", "TT"]
    assert documents(path, ambiguous="split") == ["ACGTacgt", "GG", "CC", "TT"]
    path.write_bytes(gzip.compress(b"ACGT\n"))
    with pytest.raises(ValueError, match="not FASTA: 'ACGT' stands before"):
        documents(path)


def test_a_long_fasta_record_is_one_document(tmp_path):
    letters = "".join(random.Random(0).choices("ACGTN", k=2_500_000))
    path = tmp_path / "long.fna"
    path.write_text(">x\n" + "\n".join(letters[i : i + 70] for i in range(0, len(letters), 70)))
    assert documents(path) == [letters]
    assert documents(path, ambiguous="split") == [part for part in letters.split("N") if part]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav(tmp_path, width):
    samples = np.sin(np.arange(300_000) / 9) * 0.7
    ints = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    raw = np.stack([ints, ints], 1).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(raw)
    (codes,) = documents(path, sample_rate=8000)
    assert len(codes) == len(samples)
    expected = mu_law_encode(samples).astype(int)
    # 8 bit samples are coarser than the codes near zero.
    assert np.abs(np.frombuffer(codes, np.uint8).astype(int) - expected).max() <= (16 if width == 1 else 1)
    with pytest.raises(ValueError, match="8000 samples a second, expected 16000"):
        documents(path, sample_rate=16000)
    path.write_bytes(b"RIFF....WAVE")
    with pytest.raises(ValueError, match="not a PCM WAV file"):
        documents(path)


def test_sounds_have_one_rate(tmp_path):
    for name, rate in (("a", 8000), ("b", 11025)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(b"\0\1" * 50)
    names = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    vocabulary = make_vocabulary("bytes")
    assert tokenize_files(names[:1], FileOptions(), vocabulary, tmp_path / "c").tokens == 51
    for given, options in ((names, FileOptions()), (names[1:], with_rate(expand(names[:1]), FileOptions()))):
        with pytest.raises(ValueError, match="b.wav has 11025 samples a second, expected 8000"):
            tokenize_files(given, options, vocabulary, tmp_path / "c")


def test_mu_law_is_its_own_inverse():
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(mu_law_encode(mu_law_decode(codes)), codes)
    assert mu_law_encode(np.array([-1.0, 1.0, 5.0])).tolist() == [0, 255, 255]


def test_files_are_found(tmp_path):
    for name in ("b/2.txt", "b/1.txt.xz", "b/notes.log", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda *given: [str(p.relative_to(tmp_path)) for p in expand([str(tmp_path / g) for g in given])]  # noqa: E731
    assert names("b", "a.jsonl") == ["b/1.txt.xz", "b/2.txt", "a.jsonl"]
    assert names("b/*.txt") == ["b/2.txt"]
    for given, message in (("c.txt", "there is no file"), ("b/*.wav", "no file matches")):
        with pytest.raises(ValueError, match=message):
            names(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file named"):
        names("empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"text" * 1000)[:40])
    for name in ("bad.txt", "cut.txt.xz"):
        with pytest.raises(ValueError, match="cannot be read as text"):
            documents(tmp_path / name)


# -- tokens on disk ----------------------------------------------------------------------------------------------------


def test_documents_are_tokenised_once(tmp_path):
    texts = ["The cat — naïve. " * 40, "a dog\n" * 9000, "z"]
    (tmp_path / "a.txt").write_text("|".join(texts[:2]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": texts[2]}))
    vocabulary = Vocabulary(train_tokenizer(texts, 300))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    options = FileOptions(separator="|")
    store = tokenize_files(names, options, vocabulary, tmp_path / "cache")
    assert len(store) == 3
    for index, text in enumerate(texts):
        ids = store.read(index)
        assert ids[-1] == vocabulary.end == 0
        assert vocabulary.tokenizer.decode(ids[:-1].tolist()) == text
        assert store.lengths[index] == len(ids)
        assert (store.characters[index], store.bytes[index]) == (len(text), len(text.encode()))
    assert store.tokens == sum(map(len, (store.read(i) for i in range(3))))
    assert store.files[0].dtype == np.uint16
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    tokenize_files(names, options, vocabulary, tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == before, "nothing is written again"
    tokenize_files(names, FileOptions(separator=" "), vocabulary, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) > len(before), "read in another way, tokenised anew"
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text in"):
        tokenize_files([str(tmp_path / "blank.txt")], options, vocabulary, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"a.txt: 'e' is not a nucleotide"):
        tokenize_files(names, options, make_vocabulary("nucleotides"), tmp_path / "cache")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """36 MB of text in one document take as much as 12: a few batches of it."""
    import tracemalloc

    path = tmp_path / "big.txt"
    with open(path, "w") as file:
        for _ in range(361):
            file.write("lorem ipsum dolor sit amet\n" * 3700)
    peaks = []
    for size in (12_000_000, 36_000_000):
        part = tmp_path / f"{size}.txt"
        part.write_bytes(path.read_bytes()[:size])
        tracemalloc.start()
        store = tokenize_files([str(part)], FileOptions(), make_vocabulary("bytes"), tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert store.tokens == part.stat().st_size + 1
        assert isinstance(store.files[0], np.memmap)
    assert peaks[1] < 1.1 * peaks[0]


def test_held_out_documents_are_chosen_by_content(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    path = tmp_path / "a.jsonl"
    bytes_ = make_vocabulary("bytes")

    def split(order, seed=0):
        path.write_text("\n".join(json.dumps({"text": t}) for t in order))
        store = tokenize_files([str(path)], FileOptions(), bytes_, tmp_path / str(random.random()))
        sides = store.split(0.1, seed)
        return [{bytes_.tokenizer.decode(s.read(i)[:-1].tolist()) for i in range(len(s))} for s in sides]

    train, held = split(texts)
    assert train | held == set(texts)
    assert not train & held
    assert 20 <= len(held) <= 65
    assert split(texts[::-1] + texts[:50]) == [train, held], "neither order nor copies matter"
    assert split(texts, 1)[1] != held
    with pytest.raises(ValueError, match="holds out 0"):
        TokenStore.from_arrays([np.zeros(4, np.uint8)]).split(0.01, 0)
