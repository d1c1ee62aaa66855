"""Replicas that are stopped, stuck, or merely busy."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mambakit.serving.messages import Batch, Heartbeat, WorkerOptions
from mambakit.serving.replicas import heartbeat, process
from mambakit.serving.replicas.heartbeat import Channel, HeartbeatMonitor, send_heartbeats
from tests.serving.conftest import serving, wait_until

OPTIONS = WorkerOptions("m", slots=2, heartbeat_seconds=8.0, progress_seconds=20.0, load_seconds=500.0)


def ticks(monitor: HeartbeatMonitor, count: int, loading: bool = False, message=None) -> list[str]:
    found = []
    for _ in range(count):
        if message is not None:
            monitor.received(message)
        found.append(monitor.tick(1.0, loading))
    return found


def test_silence_is_death():
    monitor = HeartbeatMonitor(OPTIONS)
    assert not any(ticks(monitor, 100, message=Heartbeat(0, False)))
    assert not any(ticks(monitor, 3))
    assert not monitor.late
    ticks(monitor, 1)
    assert monitor.late, "after half of the time nothing more is sent to it"
    monitor.received(Batch(0, 0, []))
    assert not monitor.late, "any message shows that it runs"
    *alive, dead = ticks(monitor, 9)
    assert not any(alive)
    assert "sent nothing for 8 seconds (--heartbeat-seconds)" in dead


def test_work_without_a_step_is_death_and_waiting_is_not():
    monitor = HeartbeatMonitor(OPTIONS)
    assert not any(ticks(monitor, 1000, message=Heartbeat(7, False)))
    *alive, dead = ticks(monitor, 22, message=Heartbeat(7, True))
    assert not any(alive[:20])
    assert "made no step for 20 seconds" in dead
    monitor = HeartbeatMonitor(OPTIONS)
    for step in range(30):
        assert not any(ticks(monitor, 19, message=Heartbeat(step, True))), "long steps are steps"


def test_loading_has_a_time_of_its_own():
    monitor = HeartbeatMonitor(OPTIONS)
    assert not any(ticks(monitor, 100, loading=True)), "large imports keep other threads from running"
    assert not any(ticks(monitor, 19, loading=False, message=Heartbeat(0, True)))
    monitor = HeartbeatMonitor(OPTIONS)
    found = ticks(monitor, 501, loading=True, message=Heartbeat(0, True))
    assert not any(found[:500])
    assert "not ready within 500 seconds (--load-seconds)" in found[-1]
    assert "sent nothing" in ticks(HeartbeatMonitor(OPTIONS), 121, loading=True)[-1]


def test_a_busy_main_thread_does_not_keep_the_heart_from_beating():
    class Pipe:
        sent: list = []

        def send(self, message) -> None:
            self.sent.append(message)

    steps = 5
    send_heartbeats(Channel(Pipe()), 0.01, lambda: (steps, True))  # type: ignore[arg-type]
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        steps += 0  # this thread is in one long step
    assert len(Pipe.sent) >= 3
    assert set(Pipe.sent) == {Heartbeat(5, True)}
    assert heartbeat.BEATS >= 4
    assert threading.active_count() >= 2


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_stopped_process_is_noticed_and_replaced(model, tmp_path):
    body = {"prompt": "The cat", "max_tokens": 100_000, "temperature": 0}
    options = ("--model", model, "--slots", "2", "--max-new-tokens", "100000", "--heartbeat-seconds", "4")
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
        assert "sent nothing for 4 seconds (--heartbeat-seconds) and was killed" in last["error"]["message"]
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


class _Reaped:
    """A process whose status another thread was told, which has not noted it yet."""

    def __init__(self, *statuses):
        self._statuses = list(statuses)

    def join(self, seconds=None): ...
    def kill(self): ...

    @property
    def exitcode(self):
        return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]


@pytest.mark.parametrize(
    ("statuses", "how"),
    [
        ((0,), "exit status 0"),
        ((None, None, -9), "killed by signal 9"),
        ((None, 1), "exit status 1"),
        ((None,), "its exit status is not known"),
    ],
)
def test_an_end_that_another_thread_was_told_of(statuses, how):
    assert process.end_of(_Reaped(*statuses)) == how
