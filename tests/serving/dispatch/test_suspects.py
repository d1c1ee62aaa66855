"""A retry is advised once; what replicas die of is not run again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from mambakit.serving.api.answers import Usage
from mambakit.serving.dispatch import suspects
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Piece
from mambakit.serving.metrics import Metrics


def job(inbox: Inbox, prompt: bytes = b"a", seed: int | None = None, copy: int = 0, tokens: int = 1) -> Job:
    return Job(inbox, copy, prompt, tokens, {"seed": seed, "temperature": 1.0}, 10, copy=copy)


def make(slots: int = 2, clock: Callable[[], float] = time.monotonic) -> Dispatcher:
    dispatcher = Dispatcher(["cpu", "cpu"], slots=slots, max_waiting=6, metrics=Metrics(), clock=clock)
    for replica in dispatcher.replicas:
        dispatcher.ready(replica)
    return dispatcher


def lose(dispatcher: Dispatcher, inbox: Inbox, one: Job) -> ApiError:
    """Its replica dies."""
    replica = one.replica
    assert replica is not None
    dispatcher.lost(replica, "killed by signal 9")
    dispatcher.ready(replica)
    with pytest.raises(ApiError) as caught:
        asyncio.run(inbox.take())
    return caught.value


def sent(dispatcher: Dispatcher, **options) -> tuple[Inbox, Job]:
    inbox = Inbox()
    one = job(inbox, **options)
    dispatcher.submit([one])
    return inbox, one


def test_a_text_that_two_replicas_died_of_is_not_to_be_sent_again():
    later = 0.0
    dispatcher = make(clock=lambda: time.monotonic() + later)
    first = lose(dispatcher, *sent(dispatcher, seed=1))
    assert (first.status, first.headers) == (503, {"Retry-After": "1"})
    second = lose(dispatcher, *sent(dispatcher, seed=2))
    assert (second.status, second.headers) == (500, {})
    assert "do not send it again" in second.message
    for seconds in (0.0, suspects.SECONDS - 60):
        later = seconds
        with pytest.raises(ApiError, match="2 replicas have died while they wrote this text") as refused:
            sent(dispatcher, seed=3)
        assert (refused.value.status, refused.value.retry_after) == (500, None)
    other, _ = sent(dispatcher, prompt=b"b")
    assert other._error is None
    later = suspects.SECONDS + 1
    again, _ = sent(dispatcher, seed=3)
    assert again._error is None


def test_one_death_after_another_is_no_retry():
    """Texts that were there at both deaths were sent once."""
    dispatcher = make()
    texts = [sent(dispatcher) for _ in range(4)]
    for number in (0, 1):
        mine = [(inbox, one) for inbox, one in texts if one.replica is dispatcher.replicas[number]]
        assert mine
        dispatcher.lost(dispatcher.replicas[number], "killed by signal 9")
        for inbox, _ in mine:
            with pytest.raises(ApiError, match="send the request again") as caught:
                asyncio.run(inbox.take())
            assert caught.value.status == 503


def test_what_is_beside_it_may_be_sent_again():
    dispatcher = make()
    statuses = []
    for number in range(2):
        texts = [sent(dispatcher, prompt=prompt) for prompt in (b"bad", b"good%d" % number)]
        for replica in dispatcher.replicas:
            dispatcher.lost(replica, "killed by signal 9")
            dispatcher.ready(replica)
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
    dispatcher, inbox = make(8), Inbox()
    jobs = [job(inbox, copy=copy, tokens=10) for copy in range(4)]
    dispatcher.submit(jobs)
    for one in jobs:
        dispatcher.receive(
            one.replica, Batch(0, 0, [Piece(one.id, "x", 1, "stop", cached_tokens=9 if one.copy else 4)])
        )
    text = dispatcher.metrics.text().decode()
    totals = {
        name: sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"mambakit_{name}_tokens_total{{")
        )
        for name in ("prompt", "cached", "generated")
    }
    assert totals == {"prompt": 10, "cached": 4, "generated": 4}
