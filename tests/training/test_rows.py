"""Rows of a step: packed to the last token, decided by the step alone, documents' boundaries exact, either strand."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from mambakit.training.data import FileOptions, ShuffledRows, StatefulRows, TokenStore, tokenize_files
from mambakit.training.data.rows import cut_rows, sample_rows
from mambakit.training.tokenizer import make_vocabulary

CPU = torch.device("cpu")
LENGTHS = (37, 80, 5, 90, 1)


def store_of(lengths=LENGTHS) -> TokenStore:
    """Documents whose tokens are all different: 100 i, 100 i + 1, ..."""
    return TokenStore.from_arrays([np.arange(i * 100, i * 100 + n, dtype=np.int32) for i, n in enumerate(lengths)])


def test_every_token_is_an_input_and_a_target_once_an_epoch():
    store = store_of()
    rows = ShuffledRows(store, 10, 4, 0, CPU)
    epochs, total = 8, store.tokens
    seen_inputs, seen_targets = [], []
    for step in range(round(epochs * rows.steps_per_epoch) + 3):
        tokens, _ = rows.batch(step)
        assert tokens.shape == (4, 11)
        seen_inputs += tokens[:, :-1].flatten().tolist()
        seen_targets += tokens[:, 1:].flatten().tolist()
    expected = {t for i in range(len(store)) for t in store.read(i).tolist()}
    for seen in (seen_inputs, seen_targets):
        counts = {t: seen.count(t) for t in expected}
        assert set(seen) == expected
        # A row that crosses into the next epoch may be visited early or late: at most once more or less.
        assert max(counts.values()) - min(counts.values()) <= 2, counts
        assert sum(counts.values()) >= epochs * total


def test_rows_depend_on_the_step_alone():
    make = lambda seed=0: ShuffledRows(store_of(), 10, 4, seed, CPU)  # noqa: E731
    rows = make()
    first = [rows.batch(step) for step in range(40)]
    again = make()
    for step in (33, 2, 17, 39, 0):  # out of order, in several epochs
        for a, b in zip(again.batch(step), first[step], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(make(1).batch(0)[0], first[0][0])
    part = rows.batch(7, first=1, count=2)
    assert torch.equal(part[0], first[7][0][1:3])


def test_document_boundaries_are_exact():
    for kind in (ShuffledRows, StatefulRows):
        rows = kind(store_of(), 10, 4, 3, CPU)
        for step in range(30):
            tokens, begins = rows.batch(step)
            assert torch.equal(begins, tokens % 100 == 0)
            inside = ~begins[:, 1:]
            assert torch.equal(tokens[:, 1:][inside], tokens[:, :-1][inside] + 1), (
                "tokens of a document follow each other"
            )


def test_stateful_rows_continue():
    store = store_of()
    rows = StatefulRows(store, 10, 4, 0, CPU)
    steps = int(rows.steps_per_epoch)
    assert [step for step in range(3 * steps) if rows.fresh(step).all()] == [0, steps, 2 * steps]
    assert sum(rows.fresh(step).sum() for step in range(3 * steps)) == 3 * 4
    batches = [rows.batch(step)[0] for step in range(steps)]
    for before, after in pairwise(batches):
        assert torch.equal(after[:, 0], before[:, -1]), "a row begins with the target its predecessor ended with"
    seen = {t for tokens in batches for t in tokens[:, :-1].flatten().tolist()}
    assert seen == {t for i in range(len(store)) for t in store.read(i).tolist()}


def test_some_stateful_rows_start_afresh():
    rows = StatefulRows(store_of(), 10, 4, 0, CPU, fresh_rows=0.25)
    steps = int(rows.steps_per_epoch)
    drawn = np.stack([rows.fresh(step) for step in range(100 * steps)])
    assert drawn[::steps].all()
    rest = np.delete(drawn, np.s_[::steps], axis=0)
    assert abs(rest.mean(0) - 0.25).max() < 0.05
    assert np.array_equal(drawn[7], StatefulRows(store_of(), 10, 4, 0, CPU, fresh_rows=0.25).fresh(7))
    assert not np.array_equal(
        rest[:50], np.stack([StatefulRows(store_of(), 10, 4, 1, CPU, fresh_rows=0.25).fresh(i) for i in range(50)])
    )


def test_too_little_text():
    with pytest.raises(ValueError, match="21 rows of 10, fewer than the batch of 64"):
        ShuffledRows(store_of(), 10, 64, 0, CPU)


def test_cut_rows_keep_every_input_with_its_target():
    tokens, begins = ShuffledRows(store_of(), 8, 3, 0, CPU).batch(0)
    short, flags = cut_rows(tokens, begins, 2)
    assert short.shape == flags.shape == (12, 3)
    pairs = lambda t: [tuple(p) for row in t.unfold(1, 2, 1).tolist() for p in row]  # noqa: E731
    assert pairs(short) == pairs(tokens)
    assert cut_rows(tokens, begins, 8)[0] is tokens


def test_sampled_rows_are_spread_over_the_documents():
    rows = sample_rows(store_of(), 10, 5)
    assert rows.shape == (5, 11)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 400
    assert sample_rows(store_of((7,)), 100, 5).shape == (1, 7)


# -- both strands ------------------------------------------------------------------------------------------------------


def strands(text: str) -> tuple[str, str]:
    return text, text[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.fixture
def genome(tmp_path):
    source = random.Random(5)
    records = ["".join(source.choices("ACGT", k=k)) for k in (400, 33, 250)]
    path = tmp_path / "g.fa"
    path.write_text("".join(f">{i}\n{r}\n" for i, r in enumerate(records)))
    vocabulary = make_vocabulary("nucleotides")
    return records, vocabulary, tokenize_files([str(path)], FileOptions(), vocabulary, tmp_path / "cache")


def test_rows_come_from_either_strand(genome):
    records, vocabulary, store = genome
    plain = ShuffledRows(store, 30, 4, 0, CPU)
    both = ShuffledRows(store, 30, 4, 0, CPU, vocabulary.complement, vocabulary.end)
    letters = lambda ids: "".join("|ACGTN"[i] for i in ids)  # noqa: E731
    forward = backward = 0
    for step in range(25):
        for row, other in zip(plain.batch(step)[0].tolist(), both.batch(step)[0].tolist(), strict=True):
            for part, turned in zip(letters(row).split("|"), letters(other).split("|"), strict=True):
                assert turned in strands(part)
                assert any(turned in strand for record in records for strand in strands(record))
                forward += turned == part
                backward += turned != part
    assert 0.35 < backward / (forward + backward) < 0.65
    assert torch.equal(both.batch(3)[0], ShuffledRows(store, 30, 4, 0, CPU, vocabulary.complement).batch(3)[0])


def test_stateful_rows_turn_whole_documents(genome):
    records, vocabulary, store = genome
    rows = StatefulRows(store, 7, 1, 1, CPU, vocabulary.complement)
    turned = set()
    for epoch in range(6):
        steps = range(epoch * int(rows.steps_per_epoch), (epoch + 1) * int(rows.steps_per_epoch))
        ids = torch.cat([rows.batch(step)[0][0, :-1] for step in steps])[: store.tokens].tolist()
        read = "".join("|ACGTN"[i] for i in ids).split("|")[:-1]
        assert sorted(min(strands(r)) for r in read) == sorted(min(strands(r)) for r in records)
        turned |= {r in records for r in read}
    assert turned == {True, False}
