"""States in a file system of fsspec: in memory, and by URL in a folder, as several servers would share it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from mambakit import cli
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Kept
from mambakit.serving.states.places import blobs_of
from mambakit.serving.states.store import StateStore

DATA = b"a state" * 1000


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path) -> str:
    return f"memory://{uuid.uuid4().hex}/states" if request.param == "memory" else f"file://{tmp_path}/new/states"


def add(store: StateStore, data: bytes = DATA, owner: str = "a"):
    """As a replica and the server do together: the file first, then its record."""
    blob = blobs_of(store.folder).put(data)
    return store.add(owner, Kept(blob, len(data), 5), "model", origin="prompt")


def test_a_state_is_there_for_every_server(url):
    store = StateStore(url, budget=1 << 20)
    record = add(store)
    assert store.export("a", record.id) == DATA
    other = StateStore(url, budget=1 << 20)
    assert other.count() == 1
    assert other.export("a", record.id) == DATA
    late = add(store)
    assert other.get("a", late.id).blob == record.blob, "it was made after the other had looked"
    with pytest.raises(ApiError, match="no state"):
        other.get("b", record.id)
    assert other.by_owner() == {"a": (2, len(DATA))}


def test_a_deleted_state_is_gone_and_its_file_with_the_last(url):
    clock = [1e10]
    store = StateStore(url, budget=1 << 20, clock=lambda: clock[0])
    one, two = add(store), add(store)
    store.delete("a", one.id)
    assert store.export("a", two.id) == DATA
    store.delete("a", two.id)
    assert store.blobs.size(two.blob) is None
    assert StateStore(url, budget=1 << 20).count() == 0


def test_a_damaged_or_missing_file_is_told(url):
    store = StateStore(url, budget=1 << 20)
    record = add(store)
    store.blobs._folder.write(store.blobs._name(record.blob), b"damaged")
    with pytest.raises(ApiError, match="damaged") as caught:
        store.export("a", record.id)
    assert caught.value.status == 410
    with pytest.raises(ApiError, match="gone") as caught:
        store.export("a", record.id)
    assert caught.value.status == 410
    good = add(store, b"another")
    store._files._folder.write(f"{record.id}.json", b"{}")
    assert [one.id for one in StateStore(url, budget=1 << 20).list("a")[0]] == [good.id]


def test_servers_of_one_url_keep_to_each_other(url):
    """What one of them deletes is gone at the other, and a file that the other needs stays."""
    store, other = (StateStore(url, budget=1 << 20, clock=lambda: 1e10) for _ in range(2))
    record = add(store)
    fork = other.fork("a", record.id)
    store.delete("a", record.id)
    with pytest.raises(ApiError, match="no state"):
        other.get("a", record.id)
    assert other.export("a", fork.id) == store.export("a", fork.id) == DATA
    other.delete("a", fork.id)
    assert store.blobs.size(record.blob) is None


def test_a_listing_that_fails_deletes_nothing(url, monkeypatch):
    store = StateStore(url, budget=1 << 20, clock=lambda: 1e10)
    gone, kept = add(store), add(store, b"another")

    def away(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store.blobs._folder._system, "find", away)
    store.delete("a", gone.id)
    with pytest.raises(OSError, match="Input/output"):
        store.clean()
    monkeypatch.undo()
    assert store.export("a", kept.id) == b"another"
    assert store.blobs.get(gone.blob) == DATA
    store.clean()
    assert store.blobs.size(gone.blob) is None


def test_a_write_that_fails_is_told(url, monkeypatch):
    store = StateStore(url, budget=1 << 20)
    record = add(store)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.blobs._folder._system, "pipe_file", full)
    with pytest.raises(ApiError, match="could not be kept") as caught:
        store.blobs.put(b"new")
    assert caught.value.status == 507
    monkeypatch.undo()
    assert store.export("a", record.id) == DATA


def test_urls_that_nothing_serves(capsys):
    for url in ("nothing://bucket/states", "gs://bucket" if not _has("gcsfs") else "other://bucket"):
        with pytest.raises(ValueError, match="cannot be used"):
            StateStore(url, budget=1)
        assert cli.main(["serve", "--states", url]) == 2
        assert url in capsys.readouterr().err
        assert not Path(url.partition(":")[0] + ":").exists(), "it is no folder here"


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
