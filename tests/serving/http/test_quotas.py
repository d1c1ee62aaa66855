"""Limits of each key."""

from __future__ import annotations

import random

import pytest

from mambakit.serving.errors import ApiError
from mambakit.serving.http.keys import Key, Quota
from mambakit.serving.http.quotas import Quotas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "a", **quota: int) -> Key:
    return Key(name, b"", Quota(**quota))


def test_no_key_and_no_limits():
    quotas = Quotas(Clock())
    for one in (None, key()):
        for _ in range(100):
            quotas.admit(one, 100, 10**9)


def test_texts_at_once():
    quotas, one = Quotas(Clock()), key(texts=3)
    first = quotas.admit(one, 2, 0)
    with pytest.raises(ApiError, match=r"key a has 2 texts, and 2 more") as caught:
        quotas.admit(one, 2, 0)
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    quotas.admit(one, 1, 0)
    quotas.admit(key("b", texts=1), 1, 0)
    first.end(0)
    first.end(0)  # counts once
    quotas.admit(one, 2, 0)
    with pytest.raises(ApiError):
        quotas.admit(one, 1, 0)
    with pytest.raises(ApiError, match="ask for fewer") as caught:
        quotas.admit(one, 4, 0)
    assert caught.value.retry_after is None, "it never succeeds"


def test_requests_a_minute():
    clock = Clock()
    quotas, one = Quotas(clock), key(requests_per_minute=60)
    for _ in range(60):
        quotas.admit(one, 1, 0, 0).end(0)
    with pytest.raises(ApiError, match="60 requests a minute") as caught:
        quotas.admit(one, 1, 0)
    assert caught.value.retry_after == 1
    clock.now += 1
    quotas.admit(one, 1, 0)
    with pytest.raises(ApiError):
        quotas.admit(one, 1, 0)


def test_tokens_are_counted_as_they_were_used():
    clock = Clock()
    quotas, one = Quotas(clock), key(tokens_per_minute=600)
    grant = quotas.admit(one, 1, 0, 600)
    with pytest.raises(ApiError, match="600 tokens a minute") as caught:
        quotas.admit(one, 1, 100)
    assert caught.value.retry_after == 10
    grant.end(50)  # of the 600 that it might have had
    quotas.admit(one, 1, 550)
    clock.now += 10
    quotas.admit(one, 1, 100)
    clock.now += 60
    quotas.admit(one, 1, 0, 10_000).end(10_000)  # more than it ever holds: admitted from a full bucket, and paid for
    with pytest.raises(ApiError) as caught:
        quotas.admit(one, 1, 1)
    clock.now += caught.value.retry_after
    quotas.admit(one, 1, 1)


def test_a_retry_after_is_true():
    """Whatever came before: at that time, and not a second earlier, the request is admitted."""
    chance, clock = random.Random(0), Clock()
    quotas, one = Quotas(clock), key(requests_per_minute=7, tokens_per_minute=900)
    refused = 0

    def try_it(tokens: int) -> int | None:
        try:
            quotas.admit(one, 1, 0, tokens).end(chance.randrange(tokens + 1))
        except ApiError as error:
            return error.retry_after
        return None

    for _ in range(3000):
        clock.now += chance.expovariate(0.2)
        tokens = chance.randrange(1, 1200)
        wait = try_it(tokens)
        for _ in range(2):  # the other limit may be the next
            if wait is not None:
                refused += 1
                clock.now += wait - 1.0001
                assert try_it(tokens) is not None
                clock.now += 1.0002
                wait = try_it(tokens)
        assert wait is None
    assert refused > 300


def test_a_request_that_was_refused_elsewhere_counts_as_none():
    quotas, one = Quotas(Clock()), key(texts=1, requests_per_minute=1, tokens_per_minute=10)
    quotas.admit(one, 1, 5, 5).withdraw()
    quotas.admit(one, 1, 5, 5).end(5)
    with pytest.raises(ApiError):
        quotas.admit(one, 1, 5, 5)


def test_limits_that_are_reloaded():
    quotas = Quotas(Clock())
    quotas.admit(key(tokens_per_minute=10), 1, 10)
    with pytest.raises(ApiError):
        quotas.admit(key(tokens_per_minute=10), 1, 10)
    quotas.admit(key(tokens_per_minute=20), 1, 10)
    quotas.admit(key(), 1, 10**6)
