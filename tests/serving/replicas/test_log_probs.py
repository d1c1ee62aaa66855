"""A token's log-probability goes out with the piece that shows its text, and none of a stop string's does."""

from __future__ import annotations

import random

import pytest

from mambakit.decoding.log_probs import TokenLogProb
from mambakit.serving.messages import Task
from mambakit.serving.replicas.outbox import Text


class Syllables:
    """A token for each of a few texts; 9 is a special token, without text."""

    WORDS = ("a", "bc", " ", "stop", "st", "op", "xyz", "s", "t", "")

    def decode(self, tokens: list[int], **_) -> str:
        return "".join(self.WORDS[token] for token in tokens)


def written(tokens: list[int], stop: tuple[str, ...], asked: bool = True) -> tuple[str, list, list[tuple[str, list]]]:
    """(the whole text, all log-probabilities, [(piece, log-probabilities)])."""
    text = Text(Task(0, b"", {}, len(tokens), stop), Syllables())
    text.log_probs = [] if asked else None
    pieces = []
    for number, token in enumerate(tokens):
        if asked:
            text.log_probs.append(TokenLogProb(token, -float(number)))
        pieces.append((text.add([token])[0], text.take_log_probs()))
        if text.ended:
            break
    else:
        pieces.append((text.rest(), text.take_log_probs()))
    return "".join(p for p, _ in pieces), [one for _, found in pieces for one in found], pieces


def test_without_stop_strings():
    shown, scored, pieces = written([0, 1, 9, 6], ())
    assert shown == "abcxyz"
    assert [(one.token, one.offset, one.log_prob) for one in scored] == [(0, 0, 0), (1, 1, -1), (9, 3, -2), (6, 3, -3)]
    assert [len(found) for _, found in pieces] == [1, 1, 1, 1, 0]
    assert written([0, 1], (), asked=False)[1] == []


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([0, 3, 6], [0]),
        ([0, 4, 5, 6], [0]),  # "st" is held back, and then belongs to the stop string
        ([0, 4, 6, 0], [0, 4, 6, 0]),  # held back for a while
        ([3], []),
        ([0, 7, 8, 5], [0]),
        ([0, 4], [0, 4]),  # ends while it may begin a stop string
    ],
)
def test_with_a_stop_string(tokens, kept):
    shown, scored, _ = written(tokens, ("stop",))
    assert [one.token for one in scored] == kept
    assert shown == Syllables().decode(kept)


def test_random_texts():
    rng = random.Random(0)
    for _ in range(500):
        tokens = rng.choices(range(10), k=rng.randint(1, 12))
        stop = tuple({rng.choice(["stop", "t", "as", "bcs", "op "]) for _ in range(rng.randint(0, 2))})
        shown, scored, pieces = written(tokens, stop)
        assert [one.token for one in scored] == tokens[: len(scored)]
        assert all(one.offset < max(1, len(shown)) or not Syllables.WORDS[one.token] for one in scored)
        if not any(one in Syllables().decode(tokens) for one in stop):
            assert len(scored) == len(tokens)
        length = 0
        for piece, found in pieces[:-1]:
            length += len(piece)
            for one in found:
                whole = one.offset + len(Syllables.WORDS[one.token])
                assert whole <= length or any(s in Syllables().decode(tokens) for s in stop)
