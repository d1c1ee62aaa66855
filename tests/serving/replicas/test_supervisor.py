"""Start, heartbeat, restart and the loss of replicas; no process runs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Failed, Heartbeat, Piece, Ready, Task, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.replicas.heartbeat import HeartbeatMonitor
from mambakit.serving.replicas.supervisor import Supervised, Supervisor


class _Process:
    pid, killed, reason = 1, 0, ""

    def __init__(self, options: WorkerOptions):
        self.monitor = HeartbeatMonitor(options)

    def kill(self) -> None:
        self.killed += 1

    def is_alive(self) -> bool:
        return not self.killed


def job(inbox: Inbox) -> Job:
    return Job(inbox, 0, bytes(8), 1, {}, 10)


def make(options: WorkerOptions, replicas: int, failures: list[str] | None = None) -> Supervisor:
    dispatcher = Dispatcher(["cpu"] * replicas, slots=options.slots, max_waiting=6, metrics=Metrics())
    return Supervisor(options, dispatcher, ([] if failures is None else failures).append)


def fake_launch(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, ready: int = 0) -> list[Supervised]:
    """Fake processes instead of real ones, of which the first ``ready`` are ready at once. Returns the launches."""
    launched: list[Supervised] = []

    def launch(one: Supervised) -> None:
        launched.append(one)
        process: Any = _Process(supervisor.options)
        one.process, one.given_up, one.replica.state = process, False, "loading"
        if len(launched) <= ready:
            supervisor._receive(one, Ready(), process)

    monkeypatch.setattr(supervisor, "_launch", launch)
    return launched


@pytest.mark.parametrize("ends", [True, False])
def test_what_is_stopped_gets_nothing_more_and_is_killed_with_its_texts(ends, monkeypatch):
    """``ends``: whether the process ends when it is killed; one that hangs in the kernel does not."""

    async def scenario() -> None:
        monkeypatch.setattr("mambakit.serving.replicas.supervisor._EXIT_SECONDS", 0.2)
        supervisor = make(WorkerOptions("m", slots=2, heartbeat_seconds=0.8), 2)
        dispatcher = supervisor.dispatcher
        launched = fake_launch(supervisor, monkeypatch, ready=2)
        supervisor.start()
        stopped, other = supervisor.supervised
        jobs = [job(Inbox()) for _ in range(3)]
        dispatcher.submit(jobs[:1])
        assert jobs[0].replica is stopped.replica
        first: Any = stopped.process
        states = set()
        end = time.monotonic() + 10
        while not stopped.replica.error:
            assert time.monotonic() < end
            other.process.monitor.received(Heartbeat(0, False))
            states.add(stopped.replica.state)
            if stopped.replica.state == "silent" and jobs[1].replica is None:
                dispatcher.submit(jobs[1:])
                assert [job.replica for job in jobs[1:]] == [other.replica] * 2
                assert dispatcher.health()["status"] == "degraded"
            if first.killed and ends:
                supervisor._lost(stopped, "killed by signal 9", first)
            await asyncio.sleep(0.02)
        assert states == {"ready", "silent"}
        assert first.killed == 1
        with pytest.raises(
            ApiError,
            match=r"sent nothing for 0.8 seconds \(--heartbeat-seconds\) and was killed.*send the request again",
        ):
            await jobs[0].inbox.take()
        assert other.replica.state == "ready"
        assert not jobs[1].ended
        for _ in range(20):
            for one in (other, stopped):
                one.process.monitor.received(Heartbeat(0, False))
            await asyncio.sleep(0.02)
        supervisor._lost(stopped, "killed by signal 9", first)  # its end, late: another process has its place
        supervisor._receive(stopped, Batch(0, 0, [Piece(jobs[0].id, "late", 1, "stop")]), first)  # and its last words
        assert launched == [stopped, other, stopped]
        assert stopped.replica.state == "loading"
        assert stopped.replica.restarts == 1
        supervisor._watching.cancel()

    asyncio.run(scenario())


def test_a_late_replica_that_sends_again_is_ready(monkeypatch):
    async def scenario() -> None:
        supervisor = make(WorkerOptions("m", slots=2, heartbeat_seconds=4.0), 1)
        dispatcher = supervisor.dispatcher
        fake_launch(supervisor, monkeypatch, ready=1)
        supervisor.start()
        (one,) = supervisor.supervised
        replica, monitor = one.replica, one.process.monitor
        monitor._silent = 3.0
        await asyncio.sleep(0.6)
        assert replica.state == "silent"
        with pytest.raises(ApiError, match="silent") as caught:
            dispatcher.require_ready()
        assert caught.value.status == 503
        assert dispatcher.health()["status"] == "unavailable"
        monitor.received(Batch(0, 0, [Piece(1)]))
        await asyncio.sleep(0.6)
        assert replica.state == "ready"
        supervisor._watching.cancel()

    asyncio.run(scenario())


def test_a_dead_replica_fails_its_texts_alone(monkeypatch):
    async def scenario() -> None:
        supervisor = make(WorkerOptions("m", slots=2), 2)
        dispatcher = supervisor.dispatcher
        launched = fake_launch(supervisor, monkeypatch, ready=2)
        supervisor.start()
        first, second = supervisor.supervised
        lost, kept = Inbox(), Inbox()
        dispatcher.submit([job(lost)])
        dispatcher.submit([job(kept)])
        (after,) = (m for m in iter_queue(second.replica.outgoing) if isinstance(m, Task))
        for count in range(3):
            first.replica.state = "ready"
            supervisor._lost(first, "killed by signal 9", first.process)
            await asyncio.sleep(0.01)
            assert launched[2:] == [first] * min(count + 1, 2), "the third death within a minute is waited out"
        with pytest.raises(ApiError, match="killed by signal 9.*send the request again"):
            await lost.take()
        assert kept._error is None
        assert dispatcher.health()["status"] == "degraded"
        dispatcher.receive(second.replica, Batch(0, 0, [Piece(after.id, "text", 1, "length")]))
        assert (await kept.take())[0][1].text == "text"
        supervisor._watching.cancel()

    asyncio.run(scenario())


def test_the_first_failure_to_load_is_reported(monkeypatch):
    """Later ones are not: a model that has been loaded once is no mistake of the user's."""

    async def scenario() -> None:
        failures: list[str] = []
        supervisor = make(WorkerOptions("m"), 1, failures)
        fake_launch(supervisor, monkeypatch)
        supervisor.start()
        (one,) = supervisor.supervised
        supervisor._receive(one, Failed("no such model"), one.process)
        supervisor._lost(one, "exit status 1", one.process)
        assert failures == ["replica 0 (cpu) could not start: no such model"]
        await asyncio.sleep(0.01)
        supervisor._receive(one, Ready(), one.process)
        supervisor._lost(one, "exit status 1", one.process)
        assert len(failures) == 1
        assert one.replica.error == "exit status 1"
        supervisor._watching.cancel()

    asyncio.run(scenario())


def iter_queue(messages) -> list[Any]:
    return [messages.get() for _ in range(messages.qsize())]
