"""Turns: even shares at every level, nobody waits for ever, texts of one request in their order."""

from __future__ import annotations

import random

import pytest

from mambakit.generation.turns import Turns


def turns_of(**texts: tuple) -> Turns[str]:
    turns: Turns[str] = Turns()
    for text, path in texts.items():
        turns.add(text, path)
    return turns


def test_texts_of_one_path_come_in_order():
    turns = turns_of(a=(), b=(), c=())
    assert turns.next(2) == ["a", "b"]
    assert turns.next(2, running=["a"]) == ["b", "c"]
    turns.remove("b")
    assert turns.next(5) == ["a", "c"]
    assert turns.next(5, per_request=1) == ["a"]
    assert turns.next(5, among={"c", "a"}) == ["a", "c"], "in the order of arrival"


def test_rows_are_shared_between_keys_then_requests():
    turns: Turns[tuple] = Turns()
    for request, texts in (("big", 20), ("small", 1), ("other", 3)):
        for i in range(texts):
            turns.add(("one key", request, i), ("one key", request))
    for i in range(20):
        turns.add(("another", "alone", i), ("another", "alone"))
    chosen = turns.next(8)
    assert sorted(chosen) == [
        *(("another", "alone", i) for i in range(4)),
        ("one key", "big", 0), ("one key", "other", 0), ("one key", "other", 1), ("one key", "small", 0),
    ] or sum(text[0] == "another" for text in chosen) == 4  # fmt: skip
    assert {text[1] for text in chosen} == {"alone", "big", "small", "other"}


def test_the_least_served_is_next_and_a_newcomer_is_level():
    turns = turns_of(a=("a",), b=("b",))
    turns.serve("a", 100)
    turns.serve("b", 90)
    assert turns.next(1) == ["b"]
    turns.add("c", ("c",))
    turns.serve("b", 1)
    assert turns.next(1) == ["c"], "level with the least served, who has had more since"
    turns.serve("c", 11)
    assert turns.next(1) == ["a"] or turns.next(1) == ["b"]


@pytest.mark.parametrize("seed", range(30))
def test_random_texts_have_even_shares_and_none_starves(seed):
    """An owner with fewer slots than another at the same level has no waiting text; over time, service evens out."""
    chance = random.Random(seed)
    turns: Turns[int] = Turns()
    paths: dict[int, tuple] = {}
    for text in range(chance.randrange(1, 40)):
        paths[text] = (chance.randrange(3), chance.randrange(3))[: chance.randrange(3)]
        turns.add(text, paths[text])
    rows = chance.randrange(1, 12)
    chosen = turns.next(rows)
    assert len(chosen) == len(set(chosen)) == min(rows, len(paths))
    for text in set(paths) - set(chosen):
        for level in range(len(paths[text])):
            siblings: dict[object, int] = {}
            for other in chosen:
                if len(paths[other]) > level and paths[other][:level] == paths[text][:level]:
                    siblings[paths[other][level]] = siblings.get(paths[other][level], 0) + 1
            mine = siblings.get(paths[text][level], 0)
            assert max(siblings.values(), default=0) <= mine + 1
    had = dict.fromkeys({path or ("-",) for path in paths.values()}, 0)
    for _ in range(600):
        for text in turns.next(1):
            turns.serve(text, 1)
            had[paths[text] or ("-",)] += 1
    assert min(had.values()) > 0
    while paths:
        text = chance.choice(list(paths))
        del paths[text]
        turns.remove(text)
        assert len(turns) == len(paths)
    assert turns.next(3) == []
    assert not turns._root.children
