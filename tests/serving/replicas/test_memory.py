"""Memory that a replica has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from mambakit.serving.replicas.memory import release_free_memory, trimmer

# 4,000 states of 100 KB, of which one in eight stays: the others leave holes between them.
HOLES = """
import torch
from mambakit.serving.replicas.memory import trimmer
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
before = resident()
states = [torch.ones(25_000) for _ in range(4000)]
kept = states[::8]
del states
full = resident()
trimmer()()
print(before, full, resident())
"""


@pytest.mark.skipif(trimmer() is None, reason="no glibc")
def test_holes_go_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=120)
    before, full, after = map(float, done.stdout.split())
    assert full - before > 300, done.stdout
    assert 50 <= after - before < 100, done.stdout  # 50 MB are kept


def test_it_is_called_again_and_again():
    calls = threading.Semaphore(0)
    assert release_free_memory(0.01, calls.release)
    for _ in range(3):
        assert calls.acquire(timeout=60)


def test_where_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert trimmer() is None
    assert not release_free_memory()
