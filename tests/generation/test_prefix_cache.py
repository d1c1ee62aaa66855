"""The prefix cache: a hit is the state itself; budgets hold; another model, other tokens or damage are never used."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.state import State
from tests.models.configurations import pair, tokens

ROOT = Path(__file__).resolve().parents[2]
ONE = 2 * 64 * (16 + 3) * 4  # bytes of a state of the "plain" configuration


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair("plain")[0].eval()


@pytest.fixture
def ids():
    return tokens(1, 50)[0]


def read_tokens(model, call):
    """(result, how many tokens the backbone read)."""
    read = []
    hook = model.backbone.register_forward_pre_hook(lambda m, args, kw: read.append(args[0].numel()), with_kwargs=True)
    try:
        return call(), sum(read)
    finally:
        hook.remove()


def same(a: State, b: State) -> bool:
    return (
        torch.equal(a.cache.ssm_states, b.cache.ssm_states)
        and torch.equal(a.cache.conv_states, b.cache.conv_states)
        and torch.equal(a.pending, b.pending)
    )


def test_what_is_read_again(model, ids):
    cache = PrefixCache(model, chunk_size=8)
    first, read = read_tokens(model, lambda: cache.read(ids))
    assert read == 49
    again, read = read_tokens(model, lambda: cache.read(ids))
    assert read == 0
    assert same(first, again)
    longer, read = read_tokens(model, lambda: cache.read(torch.cat([ids, ids[:5]])))
    assert read == 5
    other = ids.clone()
    other[20] = (other[20] + 1) % 61
    branch, read = read_tokens(model, lambda: cache.read(other))
    assert read == 49 - 16, "everything up to the last snapshot before the change is known"
    assert same(branch, PrefixCache(model, chunk_size=8).read(other)), "a hit has the bits of a miss"
    for state, prompt in ((first, ids), (longer, torch.cat([ids, ids[:5]])), (branch, other)):
        plain = State.read(model, prompt)
        assert torch.allclose(state.cache.ssm_states, plain.cache.ssm_states, rtol=1e-4, atol=1e-6)
        assert torch.equal(state.pending, plain.pending)
    assert cache.statistics.lookups == 4
    assert cache.statistics.hits == 3
    assert cache.statistics.tokens_saved == 49 + 49 + 16


def test_a_hit_is_a_copy(model, ids):
    cache = PrefixCache(model, chunk_size=8)
    cache.read(ids)
    _, found = cache.lookup(ids)
    kept = found.ssm_states.clone()
    found.ssm_states.fill_(7)
    position, again = cache.lookup(ids)
    assert position == 49
    assert again.get_seq_length() == 49
    assert torch.equal(again.ssm_states, kept)


def test_rows_of_a_batch_are_kept_one_by_one(model):
    prompts = [tokens(1, 12)[0], tokens(1, 9)[0]]
    batch = State.read(model, prompts)
    cache = PrefixCache(model)
    for row, prompt in enumerate(prompts):
        cache.store(prompt[:-1], batch.cache, row)
    for row, prompt in enumerate(prompts):
        position, found = cache.lookup(prompt)
        assert position == len(prompt) - 1
        assert torch.equal(found.ssm_states[:, 0], batch.cache.ssm_states[:, row])
    assert cache.lookup(prompts[0][:11])[0] == 0, (
        "a state of all its tokens leaves none to ask the next token's logits with"
    )


def test_the_memory_budget_keeps_what_was_used_last(model):
    prompts = [tokens(1, 5 + i)[0] for i in range(4)]
    cache = PrefixCache(model, memory_bytes=3 * ONE)
    for prompt in prompts[:3]:
        cache.read(prompt)
    cache.read(prompts[0])  # now the second is the oldest
    cache.read(prompts[3])
    assert cache.nbytes == 3 * ONE
    assert len(cache) == 3
    assert cache.statistics.evictions == 1
    assert [cache.lookup(p)[0] > 0 for p in prompts] == [True, False, True, True]
    assert PrefixCache(model, memory_bytes=ONE - 1).read(prompts[0]).rows == 1
    cache.clear()
    assert (len(cache), cache.nbytes, cache.lookup(prompts[0])[0]) == (0, 0, 0)


def test_a_long_prompt_takes_few_snapshots(model):
    prompt = tokens(1, 500)[0]
    cache = PrefixCache(model, chunk_size=4)
    cache.read(prompt)
    assert 8 < len(cache) <= 30
    _, read = read_tokens(model, lambda: cache.read(torch.cat([prompt[:490], prompt[:1]])))
    assert read <= 4, "the denser the nearer its end"
    _, read = read_tokens(model, lambda: cache.read(prompt[:300]))
    assert read <= 32


def test_a_changed_model_finds_nothing(ids, tmp_path):
    model = pair("plain")[0].eval()
    cache = PrefixCache(model, folder=tmp_path)
    cache.read(ids)
    assert cache.lookup(ids)[0] == 49
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log[0, 0] += 0.01
    assert cache.lookup(ids)[0] == 0
    assert PrefixCache(pair("plain")[0].eval(), folder=tmp_path).lookup(ids)[0] == 0, "other random weights"
    cache.read(ids)
    assert cache.lookup(ids)[0] == 49
    model.bfloat16()
    assert cache.lookup(ids)[0] == 0, "states of float32 are not those of bfloat16"


def test_on_disk(model, ids, tmp_path):
    first = PrefixCache(model, chunk_size=16, folder=tmp_path / "a" / "b")
    state = first.read(ids)
    second = PrefixCache(model, chunk_size=16, folder=tmp_path / "a" / "b")
    again, read = read_tokens(model, lambda: second.read(ids))
    assert read == 0
    assert same(state, again)
    assert (second.statistics.disk_hits, second.statistics.hits) == (1, 1)
    second.lookup(ids)
    assert second.statistics.disk_hits == 1, "from memory now"
    nothing_in_memory = PrefixCache(model, memory_bytes=0, folder=tmp_path / "a" / "b")
    assert nothing_in_memory.lookup(ids)[0] == 49
    assert nothing_in_memory.nbytes == 0
    assert all(p.suffix == ".safetensors" for p in (tmp_path / "a" / "b").rglob("*") if p.is_file())
    second.clear()
    assert first.lookup(ids)[0] == 49, "still in the first's memory"
    assert PrefixCache(model, folder=tmp_path / "a" / "b").lookup(ids)[0] == 0


def test_the_disk_budget(model, tmp_path):
    def cache():
        return PrefixCache(model, memory_bytes=0, folder=tmp_path, disk_bytes=4 * (ONE + 1000))

    prompts = [tokens(1, 5 + i)[0] for i in range(6)]
    for i, prompt in enumerate(prompts[:4]):
        cache().read(prompt)
        for file in tmp_path.rglob(f"{len(prompt) - 1}-*"):
            os.utime(file, (1000 + i, 1000 + i))
    assert cache().lookup(prompts[0])[0] > 0  # used, so the second is the oldest
    for prompt in prompts[4:]:
        cache().read(prompt)
    assert [cache().lookup(p)[0] > 0 for p in prompts] == [True, False, False, True, True, True]
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) <= 4 * (ONE + 1000)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may have more than 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write_behind", [False, True])
def test_a_full_disk_ends_nothing(model, ids, tmp_path, write_behind):
    """The prompt is read all the same, and files are written again once there is room."""
    cache = PrefixCache(model, folder=tmp_path, chunk_size=8, write_behind=write_behind)
    seen = []
    cache.read(ids[:3])  # hashes the weights before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mambakit.generation.prefix_cache.warnings.warn", lambda text, **_: seen.append(text))
        with full_disk():
            state = cache.read(ids)
            end = time.monotonic() + 30
            while not seen and time.monotonic() < end:
                time.sleep(0.01)
    assert "File too large" in seen[0]
    # The last bits depend on where reading began: after the first two tokens here.
    assert torch.allclose(state.cache.ssm_states, State.read(model, ids).cache.ssm_states, rtol=1e-4, atol=1e-6)
    cache.read(ids.flip(0))
    end = time.monotonic() + 30
    while PrefixCache(model, folder=tmp_path).lookup(ids.flip(0))[0] != 49 and time.monotonic() < end:
        time.sleep(0.01)
    assert PrefixCache(model, folder=tmp_path).lookup(ids.flip(0))[0] == 49


def test_a_disk_that_others_fill_is_left_to_them(model, tmp_path, monkeypatch):
    """States that are kept for good come first: the cache goes, file by file, before the disk is full."""
    size, others = 100 * ONE, [0]

    def kept() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))

    def usage(folder):
        return SimpleNamespace(free=max(0, size - others[0] - kept()))

    monkeypatch.setattr("mambakit.generation.prefix_files.shutil.disk_usage", usage)
    cache = PrefixCache(model, folder=tmp_path, chunk_size=1)

    def files() -> int:
        return len(list(tmp_path.rglob("*.safetensors")))

    def fill(first: int) -> int:
        for token in range(first, first + 20):
            cache.read([token // 50, token % 50, 5])
        return files()

    held = [fill(0)]
    for begin, used in ((20, 70), (40, 80), (60, 84), (80, 100)):
        others[0] = used * ONE
        held.append(fill(begin))
        assert not held[-1] or others[0] + kept() <= size - 16 * ONE + 1000, "a file has a header, too"
    assert held[0] >= 20
    assert held[-2:] == [0, 0]
    others[0] = 0
    assert fill(100) >= 20, "there is room again"


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(model, ids, tmp_path):
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        State.read(model, ids).save(tmp_path / "state.safetensors", model)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_read_again(model, ids, tmp_path):
    PrefixCache(model, folder=tmp_path).read(ids)
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytes([*whole[:-10], whole[-10] ^ 1, *whole[-9:]])
    for contents in (whole[:100], b"", whole[: len(whole) - 10], flipped):
        file.write_bytes(contents)
        with pytest.warns(UserWarning, match="read again"):
            state = PrefixCache(model, folder=tmp_path).read(ids)
        assert torch.allclose(state.cache.ssm_states, State.read(model, ids).cache.ssm_states, rtol=1e-4, atol=1e-6)
        assert PrefixCache(model, folder=tmp_path).lookup(ids)[0] == 49, "and kept again"
    file.with_name("49-x.tmp").write_bytes(b"half")
    os.utime(file.with_name("49-x.tmp"), (0, 0))
    PrefixCache(model, folder=tmp_path).read(ids[:30])
    assert not list(tmp_path.rglob("*.tmp")), "what a killed process left is cleared away"


def test_a_file_of_other_tokens_is_refused(model, ids, tmp_path):
    PrefixCache(model, folder=tmp_path).read(ids[:20])
    (theirs,) = tmp_path.rglob("*.safetensors")
    contents = theirs.read_bytes()
    PrefixCache(model, folder=tmp_path).read(ids.flip(0)[:20])
    (ours,) = (f for f in tmp_path.rglob("*.safetensors") if f != theirs)
    ours.write_bytes(contents)
    with pytest.warns(UserWarning, match="of other tokens"):
        assert PrefixCache(model, folder=tmp_path).lookup(ids.flip(0)[:20])[0] == 0


def test_a_salt_keeps_texts_apart(model, ids):
    cache = PrefixCache(model, chunk_size=8)
    reading = cache.begin(ids, salt="a")
    cache.store(ids[:49], State.read(model, ids).cache, salt="a")
    assert reading.position == 0
    assert [cache.begin(ids, salt=salt).position for salt in ("a", "b", "")] == [49, 0, 0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_one_owner_s_prompts_do_not_push_out_another_s(model, tmp_path, on_disk):
    where = {"memory_bytes": 0, "folder": tmp_path, "disk_bytes": 8 * (ONE + 1000)} if on_disk else {
        "memory_bytes": 8 * ONE
    }  # fmt: skip
    cache = PrefixCache(model, **where)
    prompts = {owner: [tokens(1, 5 + i)[0] for i in range(n)] for owner, n in (("small", 4), ("big", 40))}
    for owner, texts in prompts.items():
        for prompt in texts:
            cache.store(prompt[:-1], State.read(model, prompt).cache, owner=owner)
    found = {owner: sum(cache.lookup(prompt)[0] > 0 for prompt in texts) for owner, texts in prompts.items()}
    assert found == {"small": 4, "big": 4}, "an even share for each"


WORKER = """
import json, sys, torch
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.state import State
from tests.models.configurations import pair
torch.set_num_threads(1)
torch.manual_seed(0)
model = pair("plain")[0].eval()
cache = PrefixCache(model, memory_bytes=0, folder=sys.argv[1], disk_bytes=int(sys.argv[2]), chunk_size=8)
worst = 0.0
for turn in range(20):
    torch.manual_seed(turn // 2 % 5)  # each text twice: in turn, the oldest would always go just before its use
    ids = torch.randint(0, 61, (21,))
    state, plain = cache.read(ids), State.read(model, ids)
    worst = max(worst, float((state.cache.ssm_states - plain.cache.ssm_states).abs().max()))
print(json.dumps([worst, cache.statistics.hits, cache.statistics.evictions]))
"""


def test_processes_share_a_folder_that_is_too_small(tmp_path):
    """Two processes write, find and evict the same files at once: every state is right, none is half written."""
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(6 * (ONE + 1000))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error:::mambakit"}
    running = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    results = []
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
        results.append(json.loads(out))
    assert max(worst for worst, _, _ in results) < 1e-5
    assert sum(hits for _, hits, _ in results) > 0
    assert sum(evictions for _, _, evictions in results) > 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: PrefixCache(m, memory_bytes=-1), "memory_bytes is -1"),
        (lambda m: PrefixCache(m, disk_bytes=-1), "disk_bytes is -1"),
        (lambda m: PrefixCache(m, chunk_size=0), "chunk_size is 0"),
        (lambda m: PrefixCache(m, folder=""), "there is no name"),
        (lambda m: PrefixCache(m, folder=__file__), "is a file; name a folder"),
        (lambda m: PrefixCache(m, folder=f"{__file__}/in/it"), "is a file; name a folder"),
        (lambda m: PrefixCache(m).read([]), "l >= 1"),
        (lambda m: PrefixCache(m).read([m.config.vocab_size]), "a prompt has token"),
        (lambda m: PrefixCache(m).read(tokens(2, 3)), r"expected \(l,\)"),
        (lambda m: PrefixCache(m).store([1, 2], m.backbone.new_cache(1), 1), "the cache has 1 rows"),
    ],
)
def test_bad_values(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)
