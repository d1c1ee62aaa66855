"""Which replica gets which text; no process runs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random

import pytest

from mambakit.generation.turns import texts_ahead
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Cancel, Piece, Task
from mambakit.serving.metrics import Metrics


def job(inbox: Inbox, tokens: int = 10, prompt: int = 1, share: tuple = ()) -> Job:
    return Job(inbox, 0, b"", prompt, {}, tokens, share=share)


def make(slots: int, replicas: int, max_waiting: int) -> Dispatcher:
    dispatcher = Dispatcher(["cpu"] * replicas, slots=slots, max_waiting=max_waiting, metrics=Metrics())
    for replica in dispatcher.replicas:
        dispatcher.ready(replica)
    return dispatcher


@pytest.fixture
def dispatcher() -> Dispatcher:
    return make(slots=2, replicas=2, max_waiting=6)


def sent(dispatcher: Dispatcher) -> list[list]:
    return [[r.outgoing.get() for _ in range(r.outgoing.qsize())] for r in dispatcher.replicas]


def test_texts_go_where_the_least_is_left(dispatcher):
    inbox = Inbox()
    jobs = [job(inbox, 100), job(inbox, 10), job(inbox, 10), job(inbox, 10)]
    for one in jobs:
        dispatcher.submit([one])
    # the long one has a replica to itself until the other's slots are taken
    assert [one.replica.number for one in jobs] == [0, 1, 1, 0]
    assert [len(tasks) for tasks in sent(dispatcher)] == [2, 2]
    assert dispatcher.waiting == 0


def test_a_long_prompt_is_work(dispatcher):
    inbox = Inbox()
    jobs = [job(inbox, 10, prompt=5000), job(inbox, 10), job(inbox, 10)]
    dispatcher.submit(jobs)
    assert [one.replica.number for one in jobs] == [0, 1, 1]


def test_texts_beyond_the_slots_wait_in_the_queue(dispatcher):
    inbox = Inbox()
    jobs = [job(inbox) for _ in range(10)]
    dispatcher.submit(jobs)
    at_replicas = 2 * (2 + texts_ahead(2))
    assert sum(one.replica is not None for one in jobs) == at_replicas
    assert dispatcher.waiting == 6
    with pytest.raises(ApiError, match="6 texts wait already, and 1 more") as caught:
        dispatcher.submit([job(inbox)])
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    first = jobs[0]
    dispatcher.receive(first.replica, Batch(2, 0, [Piece(first.id, "x", 1, "stop")]))
    assert sum(one.replica is not None for one in jobs) == at_replicas + 1


@pytest.mark.parametrize(("slots", "most"), [(1, 3), (8, 10), (24, 27), (64, 72)])
def test_a_replica_has_as_many_texts_as_its_engine_reads_ahead(slots, most):
    dispatcher = make(slots, replicas=1, max_waiting=200)
    dispatcher.submit([job(Inbox(), share=("key", "address", "request")) for _ in range(150)])
    assert len(dispatcher.replicas[0].jobs) == most


def test_requests_and_keys_take_turns():
    """One that asks for many texts has all slots; a newcomer has a text at a replica at once all the same."""
    dispatcher = make(slots=4, replicas=1, max_waiting=100)
    (replica,) = dispatcher.replicas
    inbox = Inbox()

    def ask(count: int, *share: str) -> list[Job]:
        jobs = [job(inbox, share=share) for _ in range(count)]
        dispatcher.submit(jobs)
        return jobs

    def there(jobs: list[Job]) -> int:
        return sum(one.replica is not None and not one.ended for one in jobs)

    big = ask(60, "key", "big")
    assert there(big) == 4 + texts_ahead(4)
    small = ask(1, "key", "small")
    assert there(small) == 1, "no text of it is there, so it does not wait for the big one's"
    two = ask(5, "other", "two")
    assert there(two) == 2, "half of the slots"
    many = [ask(1, "other", str(i))[0] for i in range(20)]
    assert 4 <= there(many) < 20, "as many requests as get to their first token soon; the rest wait in the queue"
    assert sum(map(there, (big, small, two, many))) == len(replica.jobs) <= 4 * 4 + texts_ahead(4)
    order = []
    while any(not one.ended for one in big):  # each step ends the text that came first of those that have a slot
        order.append(next(iter(replica.jobs.values())))
        dispatcher.receive(replica, Batch(4, 0, [Piece(order[-1].id, "x", 1, "stop")]))
    assert max(order.index(one) for one in many + two) < 45, "others' texts do not wait until the big request is done"
    assert [order.index(one) for one in big] == sorted(order.index(one) for one in big), "its own are in order"
    assert not dispatcher._queue._texts._leaves
    assert not dispatcher._queue._texts._root.children


def test_a_full_queue_lets_in_those_who_have_less_than_their_share():
    dispatcher = make(slots=2, replicas=1, max_waiting=8)
    inbox = Inbox()
    dispatcher.submit([job(inbox, share=("key", "big")) for _ in range(10)])
    assert dispatcher.waiting == 8
    with pytest.raises(ApiError, match="8 texts wait already"):
        dispatcher.submit([job(inbox, share=("key", "big"))])
    with pytest.raises(ApiError, match="and 5 more are too many"):
        dispatcher.submit([job(inbox, share=("key", "new")) for _ in range(5)])
    dispatcher.submit([job(inbox, share=("key", "new")) for _ in range(4)])
    dispatcher.submit([job(inbox, share=("other", "a")) for _ in range(4)])
    with pytest.raises(ApiError, match="too many"):
        dispatcher.submit([job(inbox, share=("third", "a"))])
    assert dispatcher.waiting == 16, "twice the limit at most"


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_all_end(seed):
    """Random arrivals, cancellations and dying replicas: no text is lost or sent twice, and no slot stays empty."""
    chance = random.Random(seed)
    slots = chance.randrange(1, 5)
    dispatcher = make(slots=slots, replicas=chance.randrange(1, 4), max_waiting=chance.choice([5, 30, 200]))
    jobs: list[Job] = []
    sent_ids: list[int] = []
    for step in range(300):
        if step < 150 and chance.random() < 0.4:
            share = (chance.choice("abc"), chance.choice("xy"), step)
            request = [job(Inbox(), share=share) for _ in range(chance.choice([1, 1, 2, 9]))]
            with contextlib.suppress(ApiError):  # too many
                dispatcher.submit(request)
                jobs += request
        if jobs and chance.random() < 0.1:
            dispatcher.cancel([chance.choice(jobs)])
        for replica in dispatcher.replicas:
            if step < 150 and chance.random() < 0.02:
                dispatcher.lost(replica, "killed by signal 9")
                replica.outgoing = queue.SimpleQueue()
                dispatcher.ready(replica)
            there = list(replica.jobs.values())
            for one in chance.sample(there[:slots], min(len(there), slots, chance.randrange(3))):
                dispatcher.receive(replica, Batch(0, 0, [Piece(one.id, "x", 3, "cancelled" if one.ended else "stop")]))
            sent_ids += [task.id for task in (replica.outgoing.get() for _ in range(replica.outgoing.qsize()))
                         if isinstance(task, Task)]  # fmt: skip
            assert not len(dispatcher._queue) or len(replica.jobs) >= slots + texts_ahead(slots)
    for replica in dispatcher.replicas:
        while replica.jobs:
            dispatcher.receive(replica, Batch(0, 0, [Piece(next(iter(replica.jobs)), "x", 1, "stop")]))
    assert all(one.ended for one in jobs)
    assert len(sent_ids) == len(set(sent_ids))
    assert dispatcher.waiting == 0
    assert not dispatcher._queue._texts._root.children


def test_a_cancelled_text_leaves_the_queue_or_is_told_to_its_replica(dispatcher):
    inbox = Inbox()
    jobs = [job(inbox) for _ in range(10)]
    dispatcher.submit(jobs)
    dispatcher.cancel([jobs[0], jobs[-1]])
    assert sum(isinstance(m, Cancel) for messages in sent(dispatcher) for m in messages) == 1
    assert dispatcher.waiting == 5
    assert len(jobs[0].replica.jobs) == 2 + texts_ahead(2), "its slot is taken until the replica says otherwise"
    dispatcher.receive(jobs[0].replica, Batch(2, 0, [Piece(jobs[0].id, finish_reason="cancelled")]))
    assert inbox._pieces == [], "its client is gone"


def test_without_a_ready_replica():
    dispatcher = Dispatcher(["cpu"], slots=8, max_waiting=6, metrics=Metrics())
    with pytest.raises(ApiError, match=r"no replica is ready \(replica 0 \(cpu\): loading\)") as caught:
        dispatcher.submit([job(Inbox())])
    assert caught.value.status == 503
    assert dispatcher.health()["status"] == "loading"


def test_a_text_that_went_wrong_fails_its_request_alone(dispatcher):
    lost, kept = Inbox(), Inbox()
    dispatcher.submit([job(lost)])
    dispatcher.submit([job(kept)])
    (bad,), (good,) = sent(dispatcher)
    dispatcher.receive(dispatcher.replicas[0], Batch(0, 0, [Piece(bad.id, "so far", 2, "error", error="no numbers")]))
    dispatcher.receive(dispatcher.replicas[1], Batch(0, 0, [Piece(good.id, "text", 1, "length")]))
    ((_, before),) = asyncio.run(lost.take())
    assert (before.text, before.finish_reason) == ("so far", "")
    with pytest.raises(ApiError, match="text 0 of this request could not be written: no numbers") as failed:
        asyncio.run(lost.take())
    assert failed.value.status == 500
    assert asyncio.run(kept.take())[0][1].text == "text"
    assert not any(replica.jobs for replica in dispatcher.replicas)
    assert 'outcome="failed",replica="0"} 1.0' in dispatcher.metrics.text().decode()


def test_a_batch_counts_the_work_of_all_its_texts():
    """Tokens, the prompt's share with the first of them, and when that came; rates once for the whole batch."""
    now = [98.0]
    dispatcher = Dispatcher(["cpu"], slots=4, max_waiting=0, metrics=Metrics(), clock=lambda: now[0])
    (replica,) = dispatcher.replicas
    dispatcher.ready(replica)
    inbox = Inbox()
    long, short = jobs = [job(inbox, 10, prompt=160), job(inbox, 10, prompt=16)]
    dispatcher.submit(jobs)
    left, now[0] = replica.work, 100.0

    def seen(name: str) -> float:
        return next(s.value for m in dispatcher.metrics.registry.collect() for s in m.samples if s.name == name)

    dispatcher.receive(replica, Batch(2, 0, [Piece(long.id, "x", 3), Piece(short.id, "x", 2), Piece(long.id, "", 0)]))
    assert dispatcher._rates._work[-1] == (100.0, 3 + 160 / 16 + 2 + 16 / 16)
    assert left - replica.work == 16
    assert (long.tokens, short.tokens, long.first, short.first) == (3, 2, 100.0, 100.0)
    assert (seen("mambakit_time_to_first_token_seconds_count"), seen("mambakit_generated_tokens_total")) == (2, 5)
    assert seen("mambakit_time_to_first_token_seconds_sum") == 4.0
    now[0] = 101.0
    dispatcher.receive(replica, Batch(2, 0, [Piece(short.id, "x", 4), Piece(long.id, "x", 1)]))
    assert dispatcher._rates._work[-1] == (101.0, 5)
    assert left - replica.work == 21
    assert (long.first, seen("mambakit_time_to_first_token_seconds_count")) == (100.0, 2)
    assert [piece.tokens for _, piece in asyncio.run(inbox.take())] == [3, 2, 0, 4, 1]
