"""Which replica gets which text; no process runs."""

from __future__ import annotations

import asyncio

import pytest

from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Batch, Cancel, Piece, Ready, Task, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import ApiError
from mambakit.serving.router import AHEAD, Router


def job(inbox: Inbox, tokens: int = 10, prompt: int = 1) -> Job:
    return Job(inbox, 0, b"", prompt, {}, tokens)


@pytest.fixture
def router() -> Router:
    router = Router(
        WorkerOptions("m", rows=2), ["cpu", "cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None
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
