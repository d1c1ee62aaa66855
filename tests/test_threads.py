"""Bounded spinning: what the runtime reads, in processes of mambakit's own, and nothing else's environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mambakit import threads

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
UNSET = {name: value for name, value in os.environ.items() if name not in SETTINGS}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**UNSET, **environment}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip


def spins_of(display: str) -> list[int]:
    """What GNU's runtime says that it has read."""
    return [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", display)]


@pytest.mark.parametrize(
    "launched", [["-m", "mambakit"], ["-c", "from mambakit.cli import main; raise SystemExit(main())"]]
)
def test_the_runtime_has_read_it(launched):
    done = python(*launched, "env", OMP_DISPLAY_ENV="verbose")
    if not (found := spins_of(done.stderr)):
        pytest.skip("torch runs on another runtime than GNU's here")
    assert found == [threads.SPINS] * len(found)
    own = python(*launched, "env", OMP_DISPLAY_ENV="verbose", GOMP_SPINCOUNT="77")
    assert set(spins_of(own.stderr)) == {77}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", ["0", ""])
def test_the_users_setting_stays(monkeypatch, name, value):
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(name, value)
    assert not threads.bound_spinning()
    assert {n: os.environ.get(n) for n in SETTINGS} == {n: value if n == name else None for n in SETTINGS}


def test_once_and_only_before_torch(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", object())
        assert not threads.bound_spinning()
        assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert threads.bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(threads.SPINS)
    assert not threads.bound_spinning()


def test_a_program_that_imports_mambakit_keeps_its_environment():
    code = f"""
import json, os, mambakit, mambakit.cli, mambakit.ops, mambakit.training.loop
print(json.dumps([os.environ.get(n) for n in {SETTINGS!r}]))
mambakit.cli.main(["info", "--help"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=UNSET, capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[0]) == [None, None, None]


REPLICA = """
import multiprocessing, os, sys, types
from mambakit.serving.logs import LogOptions
from mambakit.serving.replicas import worker

class Told(worker._Worker):
    def __init__(self, *_):
        print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)

worker._Worker = Told
server, replica = multiprocessing.Pipe()  # its threads end the process where they cannot use it
worker.main(types.SimpleNamespace(heartbeat_seconds=1e6, logs=LogOptions()), replica)
"""


def test_a_replica_of_a_server_started_from_python():
    assert python("-c", REPLICA).stdout.split() == ["False", str(threads.SPINS)]
    assert python("-c", REPLICA, GOMP_SPINCOUNT="5").stdout.split() == ["False", "5"]
