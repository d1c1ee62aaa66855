"""A retry is advised once; what replicas die of is not run again and again."""

from __future__ import annotations

import asyncio

import pytest

from mambakit.serving import suspects
from mambakit.serving.answers import Usage
from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Batch, Piece, Ready, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import ApiError
from mambakit.serving.router import Router


def job(inbox: Inbox, prompt: bytes = b"a", seed: int | None = None, copy: int = 0, tokens: int = 1) -> Job:
    return Job(inbox, copy, prompt, tokens, {"seed": seed, "temperature": 1.0}, 10, copy=copy)


def make(rows: int = 2) -> Router:
    router = Router(
        WorkerOptions("m", rows=rows), ["cpu", "cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None
    )
    router._loop = asyncio.new_event_loop()
    router._launch = lambda replica: None  # type: ignore[method-assign]
    for replica in router.replicas:
        router._heard(replica, Ready())
    return router


def lose(router: Router, inbox: Inbox, one: Job) -> ApiError:
    """Its replica dies."""
    replica = one.replica
    assert replica is not None
    router._lost(replica, -11)
    router._heard(replica, Ready())
    with pytest.raises(ApiError) as caught:
        asyncio.run(inbox.take())
    return caught.value


def sent(router: Router, **options) -> tuple[Inbox, Job]:
    inbox = Inbox()
    one = job(inbox, **options)
    router.submit([one])
    return inbox, one


def test_a_text_that_two_replicas_died_of_is_not_to_be_sent_again(monkeypatch):
    router = make()
    first = lose(router, *sent(router, seed=1))
    assert (first.status, first.headers) == (503, {"Retry-After": "1"})
    second = lose(router, *sent(router, seed=2))
    assert (second.status, second.headers) == (500, {})
    assert "do not send it again" in second.message
    with pytest.raises(ApiError, match="2 replicas have died while they wrote this text") as refused:
        sent(router, seed=3)
    assert (refused.value.status, refused.value.retry_after) == (500, None)
    other, _ = sent(router, prompt=b"b")
    assert other._error is None
    monkeypatch.setattr(suspects.time, "monotonic", lambda now=suspects.time.monotonic: now() + suspects.SECONDS + 1)
    sent(router, seed=3)


def test_one_death_after_another_is_no_retry():
    """Texts that were there at both deaths were sent once."""
    router = make()
    texts = [sent(router) for _ in range(4)]
    for number in (0, 1):
        mine = [(inbox, one) for inbox, one in texts if one.replica is router.replicas[number]]
        assert mine
        router._lost(router.replicas[number], -9)
        for inbox, _ in mine:
            with pytest.raises(ApiError, match="send the request again") as caught:
                asyncio.run(inbox.take())
            assert caught.value.status == 503


def test_what_is_beside_it_may_be_sent_again():
    router = make()
    statuses = []
    for number in range(2):
        texts = [sent(router, prompt=prompt) for prompt in (b"bad", b"good%d" % number)]
        for replica in router.replicas:
            router._lost(replica, -9)
            router._heard(replica, Ready())
        for inbox, _ in texts:
            with pytest.raises(ApiError) as caught:
                asyncio.run(inbox.take())
            statuses.append(caught.value.status)
    assert statuses == [503, 503, 500, 503]


def test_usage_counts_each_prompt_once():
    usage = Usage([10, 7], copies=3, caching=True)
    for index, cached in enumerate((0, 9, 9, 6, 6, 6)):
        usage.count(index, 2)
        usage.count(index, 1, cached)
    assert usage.body == {
        "prompt_tokens": 17, "completion_tokens": 18, "total_tokens": 35, "prompt_tokens_details": {"cached_tokens": 6},
    }  # fmt: skip
    assert "prompt_tokens_details" not in Usage([10]).body
    assert Usage([10], caching=True).body["prompt_tokens_details"] == {"cached_tokens": 0}
    usage = Usage([10], copies=2, caching=True)
    usage.count(0, 1, 500)
    assert usage.body["prompt_tokens_details"] == {"cached_tokens": 10}, "never more than was read"


def test_metrics_count_each_prompt_once():
    router, inbox = make(8), Inbox()
    jobs = [job(inbox, copy=copy, tokens=10) for copy in range(4)]
    router.submit(jobs)
    for one in jobs:
        router._heard(one.replica, Batch(0, 0, [Piece(one.id, "x", 1, "stop", cached_tokens=9 if one.copy else 4)]))
    text = router.metrics.text().decode()
    totals = {
        name: sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"mambakit_{name}_tokens_total{{")
        )
        for name in ("prompt", "cached", "generated")
    }
    assert totals == {"prompt": 10, "cached": 4, "generated": 4}
