"""The store of states: what was acknowledged is served, whatever happens; budgets, shares, expiry, damage."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Kept, Layout
from mambakit.serving.states import blobs
from mambakit.serving.states.options import StatesOptions, open_store
from mambakit.serving.states.records import new_id
from mambakit.serving.states.store import StateStore
from mambakit.serving.states.tensors import FORMAT, check, digest_of

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = Layout("f" * 64, {"ssm_states": ("F32", (2, 1, 4, 3))}, 50)


def file_of(tokens: list[int], unread: int = 1, known: bool = True, **changes: object) -> bytes:
    """A state's file, written here by the format's definition."""
    seen = len(tokens) - unread
    tensors = {
        "ssm_states": ("F32", [2, 1, 4, 3], array("f", [float(seen)] * 24).tobytes()),
        "pending": ("I64", [1, unread], array("q", tokens[seen:]).tobytes()),
    }
    if known:
        tensors["tokens"] = ("I32", [len(tokens)], array("i", tokens).tobytes())
    metadata = {"format": FORMAT, "fingerprint": LAYOUT.fingerprint, "seen_tokens": str(seen)}
    metadata |= {k: str(v) for k, v in changes.items() if k in metadata}
    tensors |= {k: v for k, v in changes.items() if k not in metadata}  # type: ignore[misc]
    header: dict = {"__metadata__": metadata}
    at, content = 0, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at, content = at + len(data), content + data
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + content


_INFINITE = b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'


def store_of(folder: Path, **options) -> StateStore:
    return StateStore(folder, **{"budget": 1 << 20} | options)


@pytest.fixture
def store(tmp_path) -> StateStore:
    return store_of(tmp_path / "states")


def test_a_state_comes_back_after_a_restart(store):
    tokens = list(range(9))
    record = store.take("key", file_of(tokens), LAYOUT, metadata={"a": "b"})
    assert (record.tokens, record.digest) == (9, digest_of(array("q", tokens)))
    again = store_of(store.folder)
    assert again.get("key", record.id) == record
    assert again.export("key", record.id) == file_of(tokens)
    found = again.read(record, LAYOUT)
    assert (found.seen, list(found.pending), list(found.tokens)) == (8, [8], tokens)
    assert again.list("key") == ([record], False)


def test_states_of_others_are_not_there(store):
    record = store.take("a", file_of([1, 2]), LAYOUT)
    for call in (store.get, store.delete, store.fork, store.export):
        with pytest.raises(ApiError, match="there is no state") as caught:
            call("b", record.id)
        assert (caught.value.status, caught.value.code) == (404, "state_not_found")
    assert store.list("b") == ([], False)
    for id in ("", "../records", "state_" + "0" * 24, record.id + "\0"):
        with pytest.raises(ApiError, match="there is no state"):
            store.get("a", id)


def test_forks_share_a_file_and_live_on_their_own(store):
    record = store.take("a", file_of([1, 2, 3]), LAYOUT)
    used = store.used()
    fork = store.fork("a", record.id, metadata={"x": "y"})
    assert store.used() == used
    assert (fork.parent, fork.origin, fork.blob, fork.metadata) == (record.id, "fork", record.blob, {"x": "y"})
    os.utime(store.blobs.path(record.blob), (0, 0))
    store.delete("a", record.id)
    assert store.export("a", fork.id) == file_of([1, 2, 3])
    store.delete("a", fork.id)
    assert store.blobs.size(record.blob) is None
    assert store.used() == 0


def test_a_file_that_another_server_of_the_folder_needs_is_not_deleted(store):
    record = store.take("a", file_of([1, 2]), LAYOUT)
    expiring = store.take("a", file_of([3]), LAYOUT, expires_after=1e-6)
    other = store_of(store.folder)
    forks = [other.fork("a", record.id), other.fork("a", record.id)]
    again = other.take("a", file_of([3]), LAYOUT)
    for blob in (record.blob, expiring.blob):
        os.utime(store.blobs.path(blob), (0, 0))
    store.delete("a", record.id)
    store.sweep()
    assert store.count() == 3, "it has learnt of the others"
    assert other.export("a", forks[0].id) == file_of([1, 2])
    assert other.export("a", again.id) == file_of([3])
    with pytest.raises(ApiError, match="there is no state"):
        other.get("a", record.id)
    other.delete("a", forks[0].id)
    assert store.export("a", forks[1].id) == file_of([1, 2])
    store.delete("a", forks[1].id)
    store.clean()
    assert store.blobs.size(record.blob) is None, "neither has a record of it"


def test_a_fork_keeps_its_file_from_a_server_that_is_about_to_delete_it(store):
    """The other one has listed the records, this one's not yet among them."""
    record = store.take("a", file_of([1]), LAYOUT)
    os.utime(store.blobs.path(record.blob), (0, 0))
    other = store_of(store.folder)
    fork, learn = None, store._learn

    def late() -> None:
        nonlocal fork
        learn()
        fork = other._write(replace(record, id=new_id()))

    store._learn = late
    store.delete("a", record.id)
    assert other.export("a", fork.id) == file_of([1])


def test_it_is_cleaned_again_and_again(tmp_path):
    """Of a server that runs for long: states that expire, and files of texts whose clients have not waited."""
    store = open_store(str(tmp_path), StatesOptions(), 1, every=0.05)
    assert store is not None
    record = store.take("a", file_of([1]), LAYOUT, expires_after=0.3)
    orphan = store.blobs.put(file_of([2]))
    for blob in (record.blob, orphan):
        os.utime(store.blobs.path(blob), (0, 0))
    end = time.monotonic() + 20
    while (list(store.blobs.digests()) or store.count()) and time.monotonic() < end:
        time.sleep(0.05)
    assert (list(store.blobs.digests()), store.count()) == ([], 0)


def test_a_file_of_a_record_that_is_on_its_way_is_not_deleted(store):
    """The replica has written the same contents again, and its record has not come yet."""
    record = store.take("a", file_of([1]), LAYOUT)
    store.blobs.put(file_of([1]))
    store.delete("a", record.id)
    kept = Kept(record.blob, record.bytes, 1)
    assert store.add("a", kept, LAYOUT.fingerprint, origin="prompt").blob == record.blob


def test_expiry(tmp_path):
    now = [1000.0]
    store = store_of(tmp_path, seconds=50, clock=lambda: now[0])
    short = store.take("a", file_of([1]), LAYOUT, expires_after=10)
    usual = store.take("a", file_of([2]), LAYOUT)
    assert (short.expires, usual.expires) == (1010, 1050)
    now[0] = 1011
    with pytest.raises(ApiError, match="or it has expired"):
        store.get("a", short.id)
    assert store.list("a")[0] == [usual]
    store.sweep()
    assert store.count() == 1
    again = store_of(tmp_path, clock=lambda: now[0])
    assert [record.id for record in again.list("a")[0]] == [usual.id]


def test_each_key_has_its_share(tmp_path):
    size = len(file_of([1]))
    store = store_of(tmp_path, budget=4 * size + 8, keys=2)
    for token in (1, 2):
        store.take("a", file_of([token]), LAYOUT)
    with pytest.raises(ApiError, match=r"your states would have .* bytes, and may have") as caught:
        store.take("a", file_of([3]), LAYOUT)
    assert (caught.value.status, caught.value.code) == (507, "states_full")
    with store.reserved("b", size), store.reserved("b", size), pytest.raises(ApiError, match="your states"):
        store.take("b", file_of([3]), LAYOUT)
    assert store.take("b", file_of([3]), LAYOUT), "what was reserved is free again"
    store.delete("a", store.list("a")[0][0].id)
    assert store.take("a", file_of([3]), LAYOUT)


def test_pages_of_a_list(store):
    records = [store.take("a", file_of([token]), LAYOUT) for token in range(5)]
    seen, after, more = [], "", True
    while more:
        page, more = store.list("a", 2, after)
        after = page[-1].id
        seen += page
    assert {record.id for record in seen} == {record.id for record in records}
    assert [record.created for record in seen] == sorted((record.created for record in seen), reverse=True)


def test_the_nearest_state_of_a_text(store):
    text = array("q", range(20))
    a = store.take("a", file_of(list(range(5))), LAYOUT)
    b = store.take("a", file_of(list(range(12))), LAYOUT)
    store.take("a", file_of([0, 1, 2, 9, 4, 5]), LAYOUT)
    store.take("b", file_of(list(range(15))), LAYOUT)
    store.take("a", file_of(list(range(17)), known=False), LAYOUT)
    for at, expected in ((20, b), (12, b), (11, a), (5, a), (4, None)):
        assert store.nearest("a", text[:at], LAYOUT) == expected
    assert store.nearest("a", text, replace(LAYOUT, fingerprint="e" * 64)) is None


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "0 bytes are no safetensors file"),
        (b"GIF89a" + b"\0" * 50, 400, "not a whole safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", 400, "its header is said to have"),
        (struct.pack("<Q", 2) + b"[]", 400, "header cannot be read"),
        (struct.pack("<Q", 30000) + b"[" * 30000, 400, "header cannot be read"),
        (file_of([1, 2])[:-1], 400, "its header says"),
        (file_of([1, 2]) + b"x", 400, "its header says"),
        (file_of([1, 2], format="x"), 400, "no saved state"),
        (file_of([1, 2], fingerprint="e" * 64), 409, "another configuration"),
        (file_of([1, 2], seen_tokens="-1"), 400, "not a number of tokens"),
        (file_of([1, 2], seen_tokens="9"), 400, "tokens are not those"),
        (file_of([1, 50]), 400, "vocabulary, 0 to 49"),
        (file_of([1, -1]), 400, "vocabulary"),
        (file_of([1], ssm_states=("F32", [2, 2, 4, 3], b"\0" * 192)), 400, "must be F32"),
        (file_of([1], ssm_states=("F16", [2, 1, 4, 3], b"\0" * 48)), 400, "must be F32"),
        (file_of([1], more=("F32", [1], b"\0" * 4)), 400, "which no state has"),
        (file_of([1], ssm_states=("F32", [2, 1, 4, 3], array("f", [0.0] * 23 + [math.nan]).tobytes())), 400, "NaN"),
        (file_of([1], ssm_states=("F32", [2, 1, 4, 3], array("f", [-math.inf] * 24).tobytes())), 400, "infinite"),
        (struct.pack("<Q", len(_INFINITE)) + _INFINITE, 400, "header cannot be read"),
        (file_of([1], pending=("I64", [1, 2], b"\0" * 8)), 400, "another size than its shape"),
    ],
)
def test_other_files_are_refused_and_leave_nothing(store, data, status, message):
    with pytest.raises(ApiError, match=message) as caught:
        store.take("a", data, LAYOUT)
    assert caught.value.status == status
    assert not list(store.folder.rglob("*.*"))


def test_random_bytes_never_pass(store):
    chance, whole = random.Random(0), file_of(list(range(9)))
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        with contextlib.suppress(ApiError):  # any other exception fails the test
            found = check(bytes(data), LAYOUT)
            assert found.tokens is None or len(found.tokens) == found.length


def test_a_damaged_file_is_found_out_and_others_are_served(store):
    good, bad = (store.take("a", file_of([token]), LAYOUT) for token in (1, 2))
    path = store.blobs.path(bad.blob)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # then it is gone
        with pytest.raises(ApiError, match="make the state again") as caught:
            store.export("a", bad.id)
        assert (caught.value.status, caught.value.code) == (410, "state_damaged")
    assert store.export("a", good.id) == file_of([1])
    with pytest.raises(ApiError, match="is gone"):
        store.fork("a", bad.id)
    assert store.export("a", store.take("a", file_of([2]), LAYOUT).id) == file_of([2]), "made again"
    (record,) = [file for file in (store.folder / "records").iterdir() if good.id in file.name]
    record.write_text("{")
    assert store_of(store.folder).count() == 2, "a record that cannot be read hides no other"


def test_a_damaged_file_is_nobody_s_nearest(store):
    """A branch of a whole state is read from another one, or from the beginning."""
    text = list(range(9))
    near, far = (store.take("a", file_of(text[:length]), LAYOUT) for length in (6, 3))
    path = store.blobs.path(near.blob)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert store.nearest("a", array("q", text), LAYOUT) == far
    assert store.nearest("a", array("q", text), LAYOUT) == far, "its file is gone now"


@pytest.mark.parametrize("fails", ["write_bytes", "write_text"])
def test_a_full_disk(store, monkeypatch, fails):
    """Of the state's file, or of its record: an error, nothing is left, and the next state is kept."""
    before = store.take("a", file_of([1]), LAYOUT)

    def full(self, *_args, **_options):
        with open(self, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        with pytest.raises(ApiError, match="the disk is full") as caught:
            store.take("a", file_of([2]), LAYOUT)
    assert (caught.value.status, caught.value.code) == (507, "state_not_kept")
    assert not list(store.folder.rglob("*.tmp"))
    assert store.list("a")[0] == [before]
    assert store.take("a", file_of([2]), LAYOUT)


def test_what_a_killed_process_left_is_cleared_away(store):
    kept = store.take("a", file_of([1]), LAYOUT)
    orphan, fresh = store.blobs.put(file_of([2])), store.blobs.put(file_of([3]))
    half = store.blobs.path(orphan).with_name("x.tmp")
    half.write_bytes(b"half")
    for path in (half, store.blobs.path(orphan), store.blobs.path(kept.blob)):
        os.utime(path, (0, 0))
    store_of(store.folder).clean()
    assert not half.exists()
    assert [store.blobs.size(blob) is not None for blob in (kept.blob, orphan, fresh)] == [True, False, True]


WRITER = """
import sys
from tests.serving.states.test_store import LAYOUT, file_of, store_of
from pathlib import Path
store = store_of(Path(sys.argv[1]), budget=1 << 30)
for number in range(int(sys.argv[2]), 10**6):
    record = store.take("a", file_of([number % 50, number // 50 % 50, number // 2500]), LAYOUT)
    print(record.id, record.blob, flush=True)
    if number % 5 == 4:
        print(record.id, "deleting", flush=True)
        store.delete("a", record.id)
        print(record.id, "deleted", flush=True)
"""


def test_killed_anywhere(tmp_path):
    """SIGKILL at random moments: every state that was acknowledged is there and whole, every deleted one is not."""
    chance, states, number = random.Random(1), {}, 0
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(number)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        for line in lines:
            if line.endswith("\n"):
                id, blob = line.split()
                states[id] = blob
        number += len(lines) + 1
        store = store_of(tmp_path, budget=1 << 30)
        store.clean()
        for id, blob in list(states.items()):
            if blob not in ("deleting", "deleted"):
                assert store.get("a", id).blob == blob
                assert check(store.export("a", id), LAYOUT).length == 3
        alive = {record.id for record in store.list("a", 10**6)[0]}
        assert len(alive - set(states)) <= 1, "one more at most: written, and not acknowledged yet"
        states |= {id: store.get("a", id).blob for id in alive - set(states)}
        deleted = {id for id, blob in states.items() if blob == "deleted"}
        assert not deleted & alive
    assert len(states) >= 8


def test_the_temporary_files_of_others_are_left_alone(store):
    store.take("a", file_of([1]), LAYOUT)
    writing = next((store.folder / "blobs").rglob("*.safetensors")).with_name("y.tmp")
    writing.write_bytes(b"half")
    store_of(store.folder).clean()
    assert writing.exists()
    assert blobs._ABANDONED > 60


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\xff\xfe{", b"[]", b"{" * 100_000, b'{"id": 1}', {"tokens": "x"}, {"bytes": -5}, {"expires": "never"},
        {"created": []}, {"created": float("inf")}, {"created": float("nan")}, {"expires": True}, {"tokens": 10**30},
        {"owner": None}, {"metadata": 5}, {"metadata": {"a": 1}}, {"fingerprint": 0}, {"digest": None}, {"blob": 7},
        {"blob": "../../etc/passwd"}, {"parent": {}}, {"id": "state_" + "0" * 24}, {"origin": ["x"]},
    ],
)  # fmt: skip
def test_a_damaged_record_stops_nothing(tmp_path, damage):
    """The server starts, and serves all other states."""
    store = store_of(tmp_path / "states")
    bad, good = (store.take("a", file_of(tokens), LAYOUT) for tokens in ([1, 2], [3, 4]))
    (file,) = (tmp_path / "states").rglob(f"{bad.id}.json")
    whole = json.loads(file.read_text())
    file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(whole | damage).encode())
    again = store_of(tmp_path / "states")
    again.clean()
    assert again.list("a")[0] == [good]
    assert again.nearest("a", array("q", [3, 4]), LAYOUT) == good
    with pytest.raises(ApiError):
        again.get("a", bad.id)
    assert again.export("a", good.id) == file_of([3, 4])
    assert again.take("a", file_of([5, 6]), LAYOUT).tokens == 2
