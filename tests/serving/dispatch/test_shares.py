"""Even shares: counted as texts come and go, they are those of the list of all texts."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable

import pytest

from mambakit.serving.dispatch.shares import Shares

Path = tuple[Hashable, ...]


def within_share(path: Path, taken: Iterable[Path], capacity: float, count: int = 1) -> bool:
    """`Shares.fits` by its definition."""
    paths, share = list(taken), float(capacity)
    for level, name in enumerate(path):
        share /= len({other[level] for other in paths if len(other) > level} | {name})
        paths = [other for other in paths if len(other) > level and other[level] == name]
    return len(paths) + count <= share


def test_shares():
    one = Shares([("key", "r1")] * 5)
    assert one.fits(("key", "r1"), 6)
    assert not one.fits(("key", "r1"), 6, 2)
    assert one.fits(("key", "r2"), 6, 3), "the other request has more than its share"
    assert not one.fits(("key", "r2"), 6, 4)
    assert one.fits(("other", "r1"), 5, 2)
    assert not one.fits(("other", "r1"), 5, 3)
    assert not one.fits(("other", "r1"), 0)
    many = Shares(("key", f"r{i}") for i in range(8))
    assert not many.fits(("key", "new"), 8)
    assert many.fits(("other", "new"), 8, 4)
    assert Shares([()] * 3).fits((), 4)
    assert not Shares([()] * 3).fits((), 4, 2)


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_come_and_go(seed):
    chance, shares = random.Random(seed), Shares()
    texts: list[Path] = []
    for _ in range(300):
        path: Path = tuple(chance.choice("abc") for _ in range(chance.randrange(4)))
        capacity, count = chance.randrange(20), chance.randrange(1, 4)
        assert shares.fits(path, capacity, count) == within_share(path, texts, capacity, count)
        assert (path in shares) == any(other[: len(path)] == path for other in texts)
        if texts and chance.random() < 0.5:
            shares.remove(texts.pop(chance.randrange(len(texts))))
        else:
            texts.append(path)
            shares.add(path)
        assert len(shares) == len(texts)
    for path in texts:
        shares.remove(path)
    assert not shares._counts
    assert not shares._children
