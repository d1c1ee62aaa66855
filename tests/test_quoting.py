"""Values of users in error messages: never long, never unprintable, never the error itself."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mambakit.quoting import LIMIT, cut, printable, quoted


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = [
    "", "a", "a" * 99, "a" * 10**6, "\ud800", "\udcff" * 500, "日本語" * 100, "\n\x00\x7f", b"x" * 1000, None, True, 0,
    -1,
    0.5, 1e400,
    float("nan"), 10**400, -(10**5000), (10**5000,), [10**5000], [1] * 10**6, [[1] * 1000] * 1000, nested(100_000),
    {"a" * 1000: 1},
    {"\ud800": ["\ud800"]}, {1: {2: {3: {4: {5: 6}}}}}, {i: i for i in range(10**5)}, set(range(1000)), object(),
    Broken(), [Broken()],
    np.float32(0.1), np.zeros((100, 100)), torch.zeros(100, 100), torch.tensor(1.5), range(10**9), lambda: None,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_any_value_is_quoted_short_and_at_once(value):
    began = time.perf_counter()
    text = quoted(value)
    assert 0 < len(text) <= LIMIT
    assert time.perf_counter() - began < 0.5
    text.encode("utf-8")


def test_short_values_are_json():
    assert quoted("hot") == '"hot"'
    assert quoted(float("nan")) == "NaN"
    assert quoted({"a": [1, None, True]}) == '{"a": [1, null, true]}'
    assert quoted("\ud800") == r'"\ud800"'
    assert printable("a\udcffb") == r"a\udcffb"
    assert cut("x" * 300) == "x" * (LIMIT - 3) + "..."
    assert quoted(9223372036854775808) == "9223372036854775808"
