"""The garbage collector leaves alone what was loaded."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from mambakit.serving.server import freeze_when_loaded


@pytest.fixture
def collector():
    """As it is in a new process, whatever servers ran in this one before."""
    threshold = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700, 10, 10)
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_what_was_loaded_is_frozen(collector):
    loaded: Future[None] = Future()
    freeze_when_loaded(SimpleNamespace(loaded=loaded))  # type: ignore[arg-type]
    frozen = gc.get_freeze_count()
    mine = [[]]
    loaded.set_result(None)
    assert gc.get_freeze_count() > frozen + 1000
    assert not any(one is mine for one in gc.get_objects())  # the collector sees it no more
    assert gc.get_threshold()[0] == 20_000
