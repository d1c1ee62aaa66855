"""Snapshots of a GPU are copied to the host, and files written, by a thread: nobody waits for it.

Without a GPU the CPU's tensors are taken for those of one; `Snapshot.to_host` then has nothing to copy, and is made to
wait, or to fail.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambakit.generation import prefix_cache, prefix_mover, prefix_snapshot
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.prefix_snapshot import Snapshot
from mambakit.generation.stream import Sampling
from mambakit.ops._backends import captured_graph
from tests.models.configurations import pair, tokens

ROOT = Path(__file__).resolve().parents[2]
ONE = 2 * 64 * (16 + 3) * 4  # bytes of a state of the "plain" configuration


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair("plain")[0].eval()


@pytest.fixture
def gate(monkeypatch):
    """Copies wait until it is opened; it counts them."""
    gate, copies = threading.Event(), Snapshot.to_host
    gate.copied = []

    def to_host(snapshot):
        assert gate.wait(30)
        copies(snapshot)
        gate.copied.append(snapshot)

    monkeypatch.setattr(prefix_cache, "on_gpu", lambda tensors: True)
    monkeypatch.setattr(Snapshot, "to_host", to_host)
    yield gate
    gate.set()


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def store(cache, model, prompt, value: float = 1.0, owner: str = "") -> None:
    state = model.backbone.new_cache(1)
    state.ssm_states.fill_(value)
    cache.store(prompt, state, owner=owner)


def found(cache, prompt) -> float | None:
    position, state = cache.lookup([*prompt, 0])
    return float(state.ssm_states.mean()) if position == len(prompt) else None


def files(folder) -> int:
    return len(list(folder.rglob("*.safetensors")))


def test_nobody_waits_and_all_is_found_meanwhile(model, gate):
    cache = PrefixCache(model)
    for token in range(5):
        store(cache, model, [token], token)
    assert not gate.copied
    assert (len(cache), cache.nbytes) == (5, 5 * ONE)
    assert [found(cache, [token]) for token in range(5)] == [0, 1, 2, 3, 4]
    snapshots = list(cache._entries.values())
    gate.set()
    until(lambda: len(gate.copied) == 5)
    assert gate.copied == sorted(snapshots, key=lambda one: float(one.tensors()["ssm_states"].mean())), "in order"
    assert (len(cache), cache.nbytes) == (5, 5 * ONE)
    assert [found(cache, [token]) for token in range(5)] == [0, 1, 2, 3, 4]


def test_while_too_many_wait_no_more_are_taken(model, gate, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_mover, "MOST_MOVING", 3)
    cache = PrefixCache(model, folder=tmp_path, write_behind=True)
    for token in range(6):
        store(cache, model, [token], token)
    assert (len(cache), cache.nbytes) == (3, 3 * ONE)
    gate.set()
    until(lambda: files(tmp_path) == 3)
    store(cache, model, [5], 5)
    assert [found(cache, [token]) for token in range(6)] == [0, 1, 2, None, None, 5]


def test_while_the_disk_is_slow_states_are_still_held(model, gate, tmp_path, monkeypatch):
    """Copies come before files, of which too many are not written."""
    monkeypatch.setattr(prefix_mover, "MOST_UNWRITTEN", 2)
    cache = PrefixCache(model, folder=tmp_path, write_behind=True)
    gate.set()
    disk, writing, write = threading.Event(), threading.Event(), cache._files.write

    def slow(*given):
        writing.set()
        assert disk.wait(30)
        return write(*given)

    monkeypatch.setattr(cache._files, "write", slow)
    store(cache, model, [0])
    assert writing.wait(30)
    for token in range(1, 6):
        store(cache, model, [token])
    disk.set()
    cache._mover.end()
    cache._mover.join(30)
    assert (len(gate.copied), len(cache)) == (6, 6)
    assert files(tmp_path) == 3, "the one that was being written, and two that might wait"


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_a_file_is_there_at_once_where_that_is_asked_for(model, request, tmp_path, device):
    if device != "cpu":
        request.getfixturevalue("gate")  # nothing passes
    cache = PrefixCache(model, folder=tmp_path)
    store(cache, model, [1])
    assert files(tmp_path) == 1


def test_nothing_is_kept_where_nothing_could_be_held(model, gate):
    cache = PrefixCache(model, memory_bytes=ONE - 1)
    store(cache, model, [1])
    assert (len(cache), cache.nbytes, cache._mover._thread) == (0, 0, None)


def test_no_memory_but_files(model, gate, tmp_path):
    cache = PrefixCache(model, memory_bytes=0, folder=tmp_path, write_behind=True)
    store(cache, model, [1], 7)
    assert (len(cache), files(tmp_path)) == (0, 0)
    gate.set()
    until(lambda: files(tmp_path))
    assert found(cache, [1]) == 7


def test_what_is_evicted_on_its_way_stays_away(model, gate):
    cache = PrefixCache(model, memory_bytes=2 * ONE)
    for token in range(4):
        store(cache, model, [token], token)
    gate.set()
    until(lambda: len(gate.copied) == 4)
    assert (len(cache), cache.nbytes, cache.statistics.evictions) == (2, 2 * ONE, 2)
    assert [found(cache, [token]) for token in range(4)] == [None, None, 2, 3]


@pytest.mark.filterwarnings("error")  # one that is raised in the thread would end it
def test_a_copy_that_fails_loses_its_snapshot_alone(model, monkeypatch, tmp_path):
    copies, failed = Snapshot.to_host, []

    def to_host(snapshot):
        if float(snapshot.tensors()["ssm_states"].mean()) == 1:
            failed.append(snapshot)
            raise RuntimeError("not enough memory")
        copies(snapshot)

    monkeypatch.setattr(prefix_cache, "on_gpu", lambda tensors: True)
    monkeypatch.setattr(Snapshot, "to_host", to_host)
    cache = PrefixCache(model, folder=tmp_path, write_behind=True)
    for token in range(3):
        store(cache, model, [token], token)
    until(lambda: files(tmp_path) == 2)
    assert len(failed) == 1
    assert (len(cache), cache.nbytes) == (2, 2 * ONE)
    assert [found(cache, [token]) for token in range(3)] == [0, None, 2]


def test_clearing_forgets_what_is_on_its_way(model, gate, tmp_path):
    cache = PrefixCache(model, folder=tmp_path, write_behind=True)
    for token in range(3):
        store(cache, model, [token], token)
    until(lambda: cache._mover._current is not None)
    threading.Timer(0.1, gate.set).start()
    cache.clear()
    assert len(gate.copied) == 1, "the one that was being copied"
    assert (len(cache), cache.nbytes, files(tmp_path)) == (0, 0, 0)
    store(cache, model, [7], 7)
    until(lambda: files(tmp_path))
    assert [found(cache, [token]) for token in (0, 1, 2, 7)] == [None, None, None, 7]
    assert files(tmp_path) == 1


def test_the_thread_does_not_keep_the_cache(model, gate, tmp_path):
    cache = PrefixCache(model, folder=tmp_path, write_behind=True)
    store(cache, model, [1])
    store(cache, model, [2])
    gone, thread = weakref.ref(cache), cache._mover._thread
    del cache
    gc.collect()
    assert gone() is None
    assert thread.is_alive()
    gate.set()
    thread.join(30)
    assert not thread.is_alive()
    assert files(tmp_path) == 2, "it wrote what it had"


SCRIPT = """
import sys, time, torch
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.prefix_files import PrefixFiles
from tests.models.configurations import pair
write = PrefixFiles.write
def slow(*given):
    time.sleep(float(sys.argv[2]))
    return write(*given)
PrefixFiles.write = slow
model = pair("plain")[0].eval()
cache = PrefixCache(model, folder=sys.argv[1], write_behind=True)
for token in range(5):
    cache.store([token], model.backbone.new_cache(1))
print(time.monotonic(), flush=True)
"""


@pytest.mark.parametrize(("seconds", "written"), [(0.05, 5), (1000, 0)])
def test_the_interpreter_s_exit(tmp_path, seconds, written):
    """It waits for files, but not for ever."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(seconds)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - float(done.stdout) < 60, "CLOCK_MONOTONIC is the machine's"
    assert files(tmp_path) == written


def test_an_engine_s_texts(model, gate):
    """Found while nothing has been copied, and after: the same tokens."""
    prompt, sampling = tokens(1, 20)[0], Sampling(seed=3)
    cache = PrefixCache(model, chunk_size=8)

    def text() -> tuple[list[int], int]:
        (request,) = Engine(model, 2, 8, prefix_cache=cache).write([Request(prompt, sampling, 6)])
        return request.tokens, request.cached_tokens

    (cold, none), (warm, whole) = text(), text()
    assert not gate.copied
    assert (none, whole) == (0, 20)
    gate.set()
    until(lambda: len(gate.copied) == len(cache))
    assert cold == warm == text()[0]


class FakeDevice:
    """A GPU's streams and events as far as a copy to the host needs them; notes what happens, and on which stream."""

    def __init__(self, monkeypatch):
        self.log, self.stream = [], "current"
        monkeypatch.setattr(prefix_snapshot, "_device_of", lambda tensors: torch.device("cuda", 0))
        monkeypatch.setattr(prefix_snapshot, "to_host", self.copied)
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(
            record=lambda stream: self.note("record"), wait=lambda stream: self.note("precede"),
            synchronize=lambda: self.note("wait"),
        ))  # fmt: skip
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"beside {device}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def note(self, what: str) -> None:
        self.log.append((what, self.stream))

    def copied(self, tensor):
        free = []
        other = threading.Thread(target=lambda: free.append(captured_graph._capturing.acquire(blocking=False)))
        other.start()
        other.join()
        assert free == [False], "no other thread may capture a graph now"
        self.note("copy")
        return tensor

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before


def test_the_order_of_a_copy(monkeypatch):
    """After the work that writes the tensors, on a stream of its own; what is held after it is there."""
    device = FakeDevice(monkeypatch)
    snapshot, states = Snapshot({"a_states": torch.ones(3)}), torch.arange(3)
    snapshot.tensors()
    assert device.log == [("record", "current"), ("precede", "current")]
    snapshot._held = {"a_states": states}, snapshot._held[1]
    assert torch.equal(snapshot.on_host()["a_states"], states)
    del device.log[:]
    snapshot.to_host()
    beside = "beside cuda:0"
    assert device.log == [(what, beside) for what in ("precede", "copy", "record", "wait")]
    assert torch.equal(snapshot._held[0]["a_states"], states)
    assert snapshot._held[0]["a_states"].data_ptr() != states.data_ptr(), "not the pinned memory"
    snapshot.tensors()
    assert len(device.log) == 4, "nothing to wait for on the host"


@pytest.mark.cuda
def test_on_a_gpu(model):
    """Snapshots are found on the device and, later, on the host, also from another stream, with the same bits."""
    model = pair("plain")[0].eval().cuda()
    cache = PrefixCache(model)
    values = {}
    for token in range(20):
        state = model.backbone.new_cache(1)
        state.ssm_states.normal_()
        cache.store([token], state)
        values[token] = state.ssm_states.clone()
        state.ssm_states.fill_(torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        for token, expected in values.items():
            with torch.cuda.stream(side):
                position, state = cache.lookup([token, 0])
                assert position == 1
                assert torch.equal(state.ssm_states, expected)
    until(lambda: all(not t.is_cuda for one in cache._entries.values() for t in one._held[0].values()))
    assert not any(t.is_pinned() for one in cache._entries.values() for t in one._held[0].values())
    for token, expected in values.items():
        assert torch.equal(cache.lookup([token, 0])[1].ssm_states, expected)
