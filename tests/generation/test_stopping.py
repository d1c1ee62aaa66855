"""Stop strings: found as a search of the whole text would, in time that grows with the text and not with its square."""

from __future__ import annotations

import random
import time

import pytest

from mambakit.generation.stopping import StopSearch
from mambakit.generation.stream import StoppingDecoder, _TextDecoder


def by_definition(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the first stop string, after the piece that completes one."""
    text = ""
    for piece in pieces:
        text += piece
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_random_texts():
    rng = random.Random(0)
    found = 0
    for _ in range(3000):
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4)))
        pieces = ["".join(rng.choices("abc", (6, 6, 1), k=rng.randint(0, 4))) for _ in range(rng.randint(0, 12))]
        search, shown = StopSearch(stops), ""
        for i, piece in enumerate(pieces):
            shown += search.push(piece)
            if search.stopped:
                break
            whole = "".join(pieces[: i + 1])
            held = max((n for s in stops for n in range(len(s)) if whole.endswith(s[:n])), default=0)
            assert shown == whole[: len(whole) - held], "all that can be shown is shown, and no more"
        shown += search.rest()
        assert (shown, search.stopped) == by_definition(pieces, stops), (pieces, stops)
        found += search.stopped
    assert 500 < found < 2500


@pytest.mark.parametrize(
    ("stops", "pieces"),
    [
        (("a" * 50_000 + "b",), ["a"] * 100_000),
        (("a" * 50_000 + "b",), ["a" * 100_000]),
        (("ab" * 25_000 + "c", "ba" * 25_000 + "c"), ["ab"] * 50_000),
        (("a" * 300 + "b", "a" * 299 + "c", "a" * 298 + "d"), ["aaa"] * 30_000),
        (tuple("a" * n + "b" for n in range(1, 20)), ["a"] * 20_000),
    ],
    ids=["one", "whole", "two", "alike", "many"],
)  # fmt: skip
def test_strings_that_nearly_match_cost_linear_time(stops, pieces):
    """Each takes a fraction of a second; a search that is quadratic in the length would take minutes."""
    began = time.process_time()
    search = StopSearch(stops)
    shown = "".join([search.push(piece) for piece in pieces])
    assert shown + search.rest() == "".join(pieces)
    assert time.process_time() - began < 10


class Bytes:
    """A tokenizer of bytes; tokens from 256 on have no text. It counts what it decodes."""

    decoded = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(tokens)
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


def test_a_text_of_bytes_that_are_no_characters_is_shown_and_costs_linear_time():
    for token in (0x80, 0xF0, 256):
        tokenizer = Bytes()
        decoder = _TextDecoder(tokenizer)
        pieces = [decoder.push(token) for _ in range(5000)]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode([token] * 5000)
        assert tokenizer.decoded < 30 * 5000
        if token < 256:
            assert sum(map(len, pieces)) > 4900, "nothing is held back for ever"


def test_random_bytes_are_the_whole_text():
    rng = random.Random(1)
    alphabet = [*"aé日🙂".encode(), 0x80, 0xFF, 0xF0, 300, ord("b")]
    for _ in range(500):
        tokens = rng.choices(alphabet, k=rng.randint(0, 60))
        tokens += "é日🙂".encode() if rng.random() < 0.5 else b""
        tokenizer = Bytes()
        decoder = _TextDecoder(tokenizer)
        assert "".join(decoder.push(t) for t in tokens) + decoder.flush() == tokenizer.decode(tokens), tokens


def test_tokens_pushed_together_are_the_whole_text():
    """In random parts, of plain text mostly: then two decodes a part."""
    rng = random.Random(2)
    odd = [*"é日🙂".encode(), 0x80, 0xFF, 300]
    for share in (0.0, 0.05, 0.5):
        for _ in range(300):
            tokens = [
                rng.choice(odd) if rng.random() < share else rng.choice(b"ab ") for _ in range(rng.randint(1, 60))
            ]
            tokenizer = Bytes()
            decoder, shown, parts, at = _TextDecoder(tokenizer), "", 0, 0
            while at < len(tokens):
                part = tokens[at : at + rng.randint(1, 9)]
                at, parts = at + len(part), parts + 1
                shown += decoder.push_all(part)
                if not share:
                    assert shown == tokenizer.decode(tokens[:at])
            assert shown + decoder.flush() == Bytes().decode(tokens), tokens


def test_a_stop_string_before_half_a_character_is_found_at_the_end():
    class Words:
        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            return "".join("a stop\ufffd" for _ in tokens)

    decoder = StoppingDecoder(Words(), (" stop",))
    assert decoder.push(0) == ""
    assert decoder.rest() == "a"
    assert decoder.stopped
