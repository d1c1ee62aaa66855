"""Replicas that are stopped, stuck, or merely busy."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mambakit.serving import heartbeat
from mambakit.serving.heartbeat import Channel, Watch, beat
from mambakit.serving.jobs import Inbox, Job
from mambakit.serving.messages import Batch, Beat, Piece, Ready, WorkerOptions
from mambakit.serving.metrics import Metrics
from mambakit.serving.protocol import ApiError
from mambakit.serving.router import Router
from tests.serving.conftest import serving, wait_until

OPTIONS = WorkerOptions("m", rows=2, heartbeat_seconds=8.0, progress_seconds=20.0, load_seconds=500.0)


def ticks(watch: Watch, count: int, loading: bool = False, message=None) -> list[str]:
    found = []
    for _ in range(count):
        if message is not None:
            watch.heard(message)
        found.append(watch.tick(1.0, loading))
    return found


def test_silence_is_death():
    watch = Watch(OPTIONS)
    assert not any(ticks(watch, 100, message=Beat(0, False)))
    assert not any(ticks(watch, 3))
    assert not watch.silent
    ticks(watch, 1)
    assert watch.silent, "after half of the time nothing more is sent to it"
    watch.heard(Batch(0, 0, []))
    assert not watch.silent, "whatever it says, it runs"
    *alive, dead = ticks(watch, 9)
    assert not any(alive)
    assert "said nothing for 8 seconds (--heartbeat-seconds)" in dead


def test_work_without_a_step_is_death_and_waiting_is_not():
    watch = Watch(OPTIONS)
    assert not any(ticks(watch, 1000, message=Beat(7, False)))
    *alive, dead = ticks(watch, 22, message=Beat(7, True))
    assert not any(alive[:20])
    assert "made no step for 20 seconds" in dead
    watch = Watch(OPTIONS)
    for step in range(30):
        assert not any(ticks(watch, 19, message=Beat(step, True))), "long steps are steps"


def test_loading_has_a_time_of_its_own():
    watch = Watch(OPTIONS)
    assert not any(ticks(watch, 100, loading=True)), "large imports keep other threads from running"
    assert not any(ticks(watch, 19, loading=False, message=Beat(0, True)))
    watch = Watch(OPTIONS)
    found = ticks(watch, 501, loading=True, message=Beat(0, True))
    assert not any(found[:500])
    assert "not ready within 500 seconds (--load-seconds)" in found[-1]
    assert "said nothing" in ticks(Watch(OPTIONS), 121, loading=True)[-1]


class _Process:
    pid, killed, exitcode = 1, 0, None

    def kill(self) -> None:
        self.killed += 1

    def is_alive(self) -> bool:
        return not self.killed


@pytest.mark.parametrize("ends", [True, False])
def test_what_is_stopped_gets_nothing_more_and_is_killed_with_its_texts(ends, monkeypatch):
    """``ends``: whether the process ends when it is killed; one that hangs in the kernel does not."""

    async def scenario() -> None:
        monkeypatch.setattr("mambakit.serving.router._PATIENCE", 0.2)
        options = WorkerOptions("m", rows=2, heartbeat_seconds=0.8)
        router = Router(options, ["cpu", "cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None)
        launched = []

        def launch(replica) -> None:
            launched.append(replica)
            replica.process, replica.watch, replica.state = _Process(), Watch(options), "loading"
            if len(launched) <= 2:
                router._heard(replica, Ready())

        monkeypatch.setattr(router, "_launch", launch)
        router.start()
        stopped, other = router.replicas
        jobs = [Job(Inbox(), 0, bytes(8), 1, {}, 10) for _ in range(3)]
        router.submit(jobs[:1])
        assert jobs[0].replica is stopped
        first = stopped.process
        states = set()
        end = time.monotonic() + 10
        while not stopped.error:
            assert time.monotonic() < end
            other.watch.heard(Beat(0, False))
            states.add(stopped.state)
            if stopped.state == "silent" and jobs[1].replica is None:
                router.submit(jobs[1:])
                assert [job.replica for job in jobs[1:]] == [other, other]
                assert router.health()["status"] == "degraded"
            if first.killed and ends:
                router._lost(stopped, -9, first)
            await asyncio.sleep(0.02)
        assert states == {"ready", "silent"}
        assert first.killed == 1
        with pytest.raises(
            ApiError,
            match=r"said nothing for 0.8 seconds \(--heartbeat-seconds\) and was killed.*send the request again",
        ):
            await jobs[0].inbox.take()
        assert other.state == "ready"
        assert not jobs[1].ended
        for _ in range(20):
            other.watch.heard(Beat(0, False))
            stopped.watch and stopped.watch.heard(Beat(0, False))
            await asyncio.sleep(0.02)
        router._lost(stopped, -9, first)  # its end, late: another process has its place
        assert launched == [stopped, other, stopped]
        assert stopped.state == "loading"
        assert stopped.restarts == 1
        router._watching.cancel()

    asyncio.run(scenario())


def test_a_late_replica_that_speaks_again_is_ready():
    async def scenario() -> None:
        options = WorkerOptions("m", rows=2, heartbeat_seconds=4.0)
        router = Router(options, ["cpu"], max_waiting=6, metrics=Metrics(), failed=lambda reason: None)
        router._launch = lambda replica: None  # type: ignore[method-assign]
        router.start()
        (replica,) = router.replicas
        replica.process, replica.watch = _Process(), Watch(options)
        router._heard(replica, Ready())
        replica.watch._silent = 3.0
        await asyncio.sleep(0.6)
        assert replica.state == "silent"
        with pytest.raises(ApiError, match="silent") as caught:
            router.require_ready()
        assert caught.value.status == 503
        assert router.health()["status"] == "unavailable"
        replica.watch.heard(Batch(0, 0, [Piece(1)]))
        await asyncio.sleep(0.6)
        assert replica.state == "ready"
        router._watching.cancel()

    asyncio.run(scenario())


def test_a_busy_main_thread_does_not_keep_the_heart_from_beating():
    class Pipe:
        sent: list = []

        def send(self, message) -> None:
            self.sent.append(message)

    steps = 5
    beat(Channel(Pipe()), 0.01, lambda: (steps, True))  # type: ignore[arg-type]
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        steps += 0  # this thread is in one long step
    assert len(Pipe.sent) >= 3
    assert set(Pipe.sent) == {Beat(5, True)}
    assert heartbeat.BEATS >= 4
    assert threading.active_count() >= 2


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_stopped_process_is_noticed_and_replaced(model, tmp_path):
    body = {"prompt": "The cat", "max_tokens": 100_000, "temperature": 0}
    options = ("--model", model, "--rows", "2", "--max-new-tokens", "100000", "--heartbeat-seconds", "4")
    with serving(tmp_path / "log", *options) as server, ThreadPoolExecutor(2) as pool:
        server.ready()
        assert server.client.get("/ready").status_code == 200
        stream = server.stream(**body)
        next(stream)
        whole = pool.submit(server.post, **body)
        wait_until(lambda: server.health()["replicas"][0]["busy"] == 2, "both are written")
        (before,) = server.health()["replicas"]
        began = time.monotonic()
        os.kill(before["pid"], signal.SIGSTOP)
        wait_until(lambda: server.client.get("/ready").status_code == 503, "it is not ready", 15)
        assert server.client.get("/live").status_code == 200
        assert server.client.get("/health").status_code == 503
        *_, last = stream
        assert "said nothing for 4 seconds (--heartbeat-seconds) and was killed" in last["error"]["message"]
        assert whole.result().status_code == 503
        assert time.monotonic() - began < 20
        wait_until(lambda: server.health()["status"] == "ok", "another has its place")
        (after,) = server.health()["replicas"]
        assert after["restarts"] == 1
        assert after["pid"] != before["pid"]
        assert server.complete(prompt="The", max_tokens=3)["usage"]["completion_tokens"] == 3
        os.kill(after["pid"], signal.SIGSTOP)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15, "a stopped replica does not hold up the end"
    assert "Traceback" not in (tmp_path / "log").read_text()
