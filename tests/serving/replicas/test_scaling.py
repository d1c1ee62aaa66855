"""How many replicas run, alone and with a supervisor of replicas that are none."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import pytest

from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Inbox, Job
from mambakit.serving.messages import Batch, Heartbeat, Piece, Ready, Stop, Task, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.replicas import supervisor as supervisors
from mambakit.serving.replicas.heartbeat import HeartbeatMonitor
from mambakit.serving.replicas.scaling import Scaling, ScalingOptions
from mambakit.serving.replicas.supervisor import Supervisor


def test_more_while_texts_wait_and_fewer_when_idle():
    scaling = Scaling(ScalingOptions(1, 4, up_seconds=5, down_seconds=60), slots=8)
    assert scaling.wanted(1, 8, 0) == 1
    assert scaling.wanted(1, 9, 10) == 1, "not at once"
    assert scaling.wanted(1, 20, 14.9) == 1
    assert scaling.wanted(1, 20, 15) == 3
    assert scaling.wanted(3, 1000, 16) == 3
    assert scaling.wanted(3, 1000, 21) == 4, "at most"
    assert scaling.wanted(4, 0, 100) == 4
    assert scaling.wanted(4, 30, 130) == 4, "a moment of work begins the time again"
    assert scaling.wanted(4, 0, 131) == 4
    assert scaling.wanted(4, 0, 191) == 3, "one at a time"
    assert scaling.wanted(3, 0, 192) == 3
    assert scaling.wanted(3, 0, 252) == 2
    assert scaling.wanted(1, 0, 1000) == 1
    assert scaling.wanted(1, 0, 2000) == 1, "at least"


def test_limits_that_are_none():
    for least, most in ((0, 1), (2, 1), (-1, -1)):
        with pytest.raises(ValueError, match="min_replicas"):
            ScalingOptions(least, most)


class Imagined:
    """A transport to nothing: writes a token of each text for every call of `write`."""

    all: list[Imagined] = []

    def __init__(self, options: WorkerOptions, outgoing: queue.SimpleQueue, loop: Any, received: Any, lost: Any):
        self.monitor, self.reason, self.pid = HeartbeatMonitor(options), "", 1
        self.outgoing, self.received, self.lost, self.alive = outgoing, received, lost, True
        self.texts: list[Task] = []
        Imagined.all.append(self)
        loop.call_soon(received, self, Ready())

    def is_alive(self) -> bool:
        return self.alive

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            self.lost(self, "killed")

    def write(self) -> None:
        self.monitor.received(Heartbeat(0, False))
        while not self.outgoing.empty():
            message = self.outgoing.get()
            if isinstance(message, Task):
                self.texts.append(message)
            elif isinstance(message, Stop):
                self.alive = False
                self.lost(self, "exit status 0")
        if self.texts:
            pieces = [Piece(task.id, "x", 1, "stop") for task in self.texts]
            self.texts = []
            self.received(self, Batch(0, 0, pieces))


def test_replicas_come_and_go(monkeypatch):
    Imagined.all = []
    clock = [0.0]
    monkeypatch.setattr(supervisors.time, "monotonic", lambda: clock[0])

    async def run() -> None:
        dispatcher = Dispatcher(("cpu",) * 3, slots=2, max_waiting=100, metrics=Metrics())
        scaling = Scaling(ScalingOptions(1, 3, up_seconds=2, down_seconds=10), 2)
        supervisor = Supervisor(WorkerOptions("m"), dispatcher, pytest.fail, Imagined, scaling=scaling)
        supervisor.start()
        supervisor._watching.cancel()

        async def tick(seconds: float, write: bool = False) -> list[str]:
            for _ in range(int(seconds)):
                clock[0] += 1
                supervisor._tick(0.0)
                for one in Imagined.all:
                    if write and one.alive:
                        one.write()
                await asyncio.sleep(0)
            return [replica.state for replica in dispatcher.replicas]

        assert await tick(1) == ["ready", "asleep", "asleep"]
        assert dispatcher.health()["status"] == "ok"
        inbox = Inbox()
        jobs = [Job(inbox, n, b"\0" * 8, 1, {"seed": None}, 5) for n in range(6)]
        dispatcher.submit(jobs)
        assert await tick(4) == ["ready", "ready", "ready"]
        assert sum(len(replica.jobs) for replica in dispatcher.replicas) >= 6
        assert await tick(3, write=True) == ["ready", "ready", "ready"]
        assert all(job.ended for job in jobs)
        states = await tick(40, write=True)
        assert sorted(states) == ["asleep", "asleep", "ready"]
        assert dispatcher.health()["status"] == "ok"
        assert [replica.restarts for replica in dispatcher.replicas] == [0, 0, 0], "they were told to stop"
        assert sum(one.alive for one in Imagined.all) == 1

        # One that drains while texts come again goes on, and what it writes is not cut off.
        dispatcher.submit([Job(inbox, n, b"\0" * 8, 1, {"seed": None}, 5) for n in range(4)])
        assert sorted(await tick(4)) == ["asleep", "ready", "ready"]
        dispatcher.submit([Job(inbox, n, b"\0" * 8, 1, {"seed": None}, 5) for n in range(3)])
        draining = next(replica for replica in dispatcher.replicas if replica.state == "ready" and replica.jobs)
        draining.state = "draining"
        await tick(4, write=True)
        assert not draining.jobs

    asyncio.run(run())
