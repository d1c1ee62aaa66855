"""Which replica gets which text; no process runs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
from types import SimpleNamespace

import pytest

from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Batch, Cancel, Piece, Ready, Task, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import ApiError
from mambakit.serving.router import Router
from mambakit.serving.waiting import AHEAD


def job(inbox: Inbox, tokens: int = 10, prompt: int = 1, share: tuple = ()) -> Job:
    return Job(inbox, 0, b"", prompt, {}, tokens, share=share)


@pytest.fixture
def router() -> Router:
    router = Router(
        WorkerOptions("m", rows=2), ["cpu", "cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None
    )
    for replica in router.replicas:
        router._heard(replica, Ready())
    return router


def ready_router(rows: int, replicas: int, max_waiting: int) -> Router:
    router = Router(
        WorkerOptions("m", rows=rows), ["cpu"] * replicas, max_waiting=max_waiting, metrics=Metrics(), failed=print
    )
    for replica in router.replicas:
        router._heard(replica, Ready())
    return router


def sent(router: Router) -> list[list]:
    return [[r.outgoing.get() for _ in range(r.outgoing.qsize())] for r in router.replicas]


def test_texts_go_where_the_least_is_left(router):
    inbox = Inbox()
    jobs = [job(inbox, 100), job(inbox, 10), job(inbox, 10), job(inbox, 10)]
    for one in jobs:
        router.submit([one])
    # the long one has a replica to itself until the other's rows are taken
    assert [one.replica.number for one in jobs] == [0, 1, 1, 0]
    assert [len(tasks) for tasks in sent(router)] == [2, 2]
    assert router.waiting == 0


def test_a_long_prompt_is_work(router):
    inbox = Inbox()
    jobs = [job(inbox, 10, prompt=5000), job(inbox, 10), job(inbox, 10)]
    router.submit(jobs)
    assert [one.replica.number for one in jobs] == [0, 1, 1]


def test_texts_beyond_the_rows_wait_at_the_front(router):
    inbox = Inbox()
    jobs = [job(inbox) for _ in range(10)]
    router.submit(jobs)
    at_replicas = 2 * (2 + AHEAD)
    assert sum(one.replica is not None for one in jobs) == at_replicas
    assert router.waiting == 6
    with pytest.raises(ApiError, match="6 texts wait already, and 1 more") as caught:
        router.submit([job(inbox)])
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    first = jobs[0]
    router._heard(first.replica, Batch(2, 0, [Piece(first.id, "x", 1, "stop")]))
    assert sum(one.replica is not None for one in jobs) == at_replicas + 1


def test_requests_and_keys_take_turns():
    """One that asks for many texts has all rows; whoever comes has a text at a replica at once all the same."""
    router = ready_router(rows=4, replicas=1, max_waiting=100)
    (replica,) = router.replicas
    inbox = Inbox()

    def ask(count: int, *share: str) -> list[Job]:
        jobs = [job(inbox, share=share) for _ in range(count)]
        router.submit(jobs)
        return jobs

    def there(jobs: list[Job]) -> int:
        return sum(one.replica is not None and not one.ended for one in jobs)

    big = ask(60, "key", "big")
    assert there(big) == 4 + AHEAD
    small = ask(1, "key", "small")
    assert there(small) == 1, "no text of it is there, so it does not wait for the big one's"
    two = ask(5, "other", "two")
    assert there(two) == 2, "half of the rows"
    many = [ask(1, "other", str(i))[0] for i in range(20)]
    assert 4 <= there(many) < 20, "as many requests as get to their first token soon; the rest wait at the front"
    assert sum(map(there, (big, small, two, many))) == len(replica.jobs) <= 4 * 4 + AHEAD
    order = []
    while any(not one.ended for one in big):  # each step ends the text that came first of those that have a row
        order.append(next(iter(replica.jobs.values())))
        router._heard(replica, Batch(4, 0, [Piece(order[-1].id, "x", 1, "stop")]))
    assert max(order.index(one) for one in many + two) < 45, "others' texts do not wait until the big request is done"
    assert [order.index(one) for one in big] == sorted(order.index(one) for one in big), "its own are in order"
    assert not router._queue._turns._leaves
    assert not router._queue._turns._root.children


def test_a_full_queue_lets_in_those_who_have_less_than_their_share():
    router = ready_router(rows=2, replicas=1, max_waiting=8)
    inbox = Inbox()
    router.submit([job(inbox, share=("key", "big")) for _ in range(10)])
    assert router.waiting == 8
    with pytest.raises(ApiError, match="8 texts wait already"):
        router.submit([job(inbox, share=("key", "big"))])
    with pytest.raises(ApiError, match="and 5 more are too many"):
        router.submit([job(inbox, share=("key", "new")) for _ in range(5)])
    router.submit([job(inbox, share=("key", "new")) for _ in range(4)])
    router.submit([job(inbox, share=("other", "a")) for _ in range(4)])
    with pytest.raises(ApiError, match="too many"):
        router.submit([job(inbox, share=("third", "a"))])
    assert router.waiting == 16, "twice the limit at most"


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_all_end(seed):
    """Whatever comes, is cancelled, ends or dies with its replica: no text is lost, none is sent twice, no row stays empty."""
    chance = random.Random(seed)
    rows = chance.randrange(1, 5)
    router = ready_router(rows=rows, replicas=chance.randrange(1, 4), max_waiting=chance.choice([5, 30, 200]))
    router._loop = SimpleNamespace(call_later=lambda *_: None)  # type: ignore[assignment]
    jobs: list[Job] = []
    sent_ids: list[int] = []
    for step in range(300):
        if step < 150 and chance.random() < 0.4:
            share = (chance.choice("abc"), chance.choice("xy"), step)
            request = [job(Inbox(), share=share) for _ in range(chance.choice([1, 1, 2, 9]))]
            with contextlib.suppress(ApiError):  # too many
                router.submit(request)
                jobs += request
        if jobs and chance.random() < 0.1:
            router.cancel([chance.choice(jobs)])
        for replica in router.replicas:
            if step < 150 and chance.random() < 0.02:
                router._lost(replica, -9)
                replica.outgoing = queue.SimpleQueue()
                router._heard(replica, Ready())
            there = list(replica.jobs.values())
            for one in chance.sample(there[:rows], min(len(there), rows, chance.randrange(3))):
                router._heard(replica, Batch(0, 0, [Piece(one.id, "x", 3, "cancelled" if one.ended else "stop")]))
            sent_ids += [task.id for task in (replica.outgoing.get() for _ in range(replica.outgoing.qsize()))
                         if isinstance(task, Task)]  # fmt: skip
            assert len(replica.jobs) >= min(rows + AHEAD, len(router._queue) and rows + AHEAD)
    for replica in router.replicas:
        while replica.jobs:
            router._heard(replica, Batch(0, 0, [Piece(next(iter(replica.jobs)), "x", 1, "stop")]))
    assert all(one.ended for one in jobs)
    assert len(sent_ids) == len(set(sent_ids))
    assert router.waiting == 0
    assert not router._queue._turns._root.children


def test_a_cancelled_text_leaves_the_queue_or_is_told_to_its_replica(router):
    inbox = Inbox()
    jobs = [job(inbox) for _ in range(10)]
    router.submit(jobs)
    router.cancel([jobs[0], jobs[-1]])
    assert sum(isinstance(m, Cancel) for messages in sent(router) for m in messages) == 1
    assert router.waiting == 5
    assert len(jobs[0].replica.jobs) == 2 + AHEAD, "its row is taken until the replica says otherwise"
    router._heard(jobs[0].replica, Batch(2, 0, [Piece(jobs[0].id, finish_reason="cancelled")]))
    assert inbox._pieces == [], "nobody listens any more"


def test_without_a_ready_replica():
    router = Router(WorkerOptions("m"), ["cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None)
    with pytest.raises(ApiError, match=r"no replica is ready \(replica 0 \(cpu\): loading\)") as caught:
        router.submit([job(Inbox())])
    assert caught.value.status == 503
    assert router.health()["status"] == "loading"


def test_a_text_that_went_wrong_fails_its_request_alone(router):
    lost, kept = Inbox(), Inbox()
    router.submit([job(lost)])
    router.submit([job(kept)])
    (bad,), (good,) = sent(router)
    router._heard(router.replicas[0], Batch(0, 0, [Piece(bad.id, "so far", 2, "error", error="no numbers")]))
    router._heard(router.replicas[1], Batch(0, 0, [Piece(good.id, "text", 1, "length")]))
    ((_, before),) = asyncio.run(lost.take())
    assert (before.text, before.finish_reason) == ("so far", "")
    with pytest.raises(ApiError, match="text 0 of this request could not be written: no numbers") as failed:
        asyncio.run(lost.take())
    assert failed.value.status == 500
    assert asyncio.run(kept.take())[0][1].text == "text"
    assert not any(replica.jobs for replica in router.replicas)
    assert 'outcome="failed",replica="0"} 1.0' in router.metrics.text().decode()


def test_a_dead_replica_fails_its_texts_alone():
    async def scenario() -> None:
        router = Router(
            WorkerOptions("m", rows=2), ["cpu", "cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None
        )
        router._loop = asyncio.get_running_loop()
        relaunched = []
        router._launch = relaunched.append  # type: ignore[method-assign]
        for replica in router.replicas:
            router._heard(replica, Ready())
        lost, kept = Inbox(), Inbox()
        router.submit([job(lost)])
        router.submit([job(kept)])
        first = router.replicas[0]
        for count in range(3):
            first.state = "ready"
            router._lost(first, -9)
            await asyncio.sleep(0.01)
            assert relaunched == [first] * min(count + 1, 2), "the third death within a minute is waited out"
        with pytest.raises(ApiError, match="killed by signal 9.*send the request again"):
            await lost.take()
        assert kept._error is None
        assert router.health()["status"] == "degraded"
        (after,) = (m for m in sent(router)[1] if isinstance(m, Task))
        router._heard(router.replicas[1], Batch(0, 0, [Piece(after.id, "text", 1, "length")]))
        assert (await kept.take())[0][1].text == "text"

    asyncio.run(scenario())
