"""A prompt is read in one forward, and in none where all of it is known; the text has the same bits."""

from __future__ import annotations

import shutil
from array import array
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mambakit.decoding import bucket_graphs
from mambakit.decoding.chunks import bucket_of
from mambakit.generation import prefix_files, reading
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling
from mambakit.serving.messages import Task, TextOptions
from mambakit.serving.replicas.scoring import Scorer
from tests.decoding.eager_graph import read_in_buckets
from tests.models.configurations import pair, tokens

ONE, LOGITS = 2 * 64 * (16 + 3) * 4, 61 * 4  # bytes of a state of the "plain" configuration, and of its logits
SAMPLINGS = [
    Sampling(0), Sampling(0.9, seed=3), Sampling(1.2, seed=5, top_k=9, repetition_penalty=1.3),
    Sampling(0.8, seed=7, top_p=0.9, presence_penalty=0.4, logit_bias={5: 2.0}),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = pair("plain")[0].eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def forwards(monkeypatch):
    """The lengths of the parts that engines and scorers read one by one."""
    found, parts = [], reading.prefill_parts

    def counted(model, part, *args, **options):
        found.append(part.shape[1])
        return parts(model, part, *args, **options)

    monkeypatch.setattr(reading, "prefill_parts", counted)
    return found


def write(model, cache, prompts, sampling=SAMPLINGS[1], **options) -> list[Request]:
    engine = Engine(model, 4, 8, prefix_cache=cache)
    return engine.write([Request(ids, sampling, 6, log_probs=2, **options) for ids in prompts])


def same(one: Request, other: Request) -> bool:
    """Tokens and log-probabilities, to the bit."""
    return (one.tokens, one.token_log_probs) == (other.tokens, other.token_log_probs)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 27])
def test_one_reading_and_none(model, forwards, tmp_path, length, sampling):
    prompt = tokens(1, length)[0]
    (plain,) = write(model, None, [prompt], sampling)
    del forwards[:]
    cache = PrefixCache(model, chunk_size=8, folder=tmp_path)
    (cold,) = write(model, cache, [prompt], sampling)
    assert forwards == [8] * (length // 8) + [length % 8] * (length % 8 > 0), "the last token is not read by itself"
    assert cold.cached_tokens == 0
    del forwards[:]
    (again,) = write(model, cache, [prompt], sampling)
    restarted = PrefixCache(model, chunk_size=8, folder=tmp_path)
    (later,) = write(model, restarted, [prompt], sampling)
    assert not forwards
    assert (again.cached_tokens, later.cached_tokens) == (length, length)
    assert (restarted.statistics.disk_hits, restarted.statistics.tokens_saved) == (1, length)
    assert all(same(one, plain) for one in (cold, again, later)), "the chunks are those without a cache"


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_in_groups(model, kept, tmp_path, monkeypatch):
    """As on a GPU: prompts that are known are not read, the others together; all begin with one look of the sampler."""
    read_in_buckets(monkeypatch)
    prompts = [tokens(1, n)[0] for n in (1, 3, 5, 16, 16, 9, 40)]
    plain = [write(model, None, [ids])[0] for ids in prompts]

    def cache():
        return PrefixCache(model, chunk_size=8, folder=tmp_path if kept == "folder" else None)

    known = cache()
    for ids in prompts[1::2]:
        write(model, known, [ids])
    rows, read = [], bucket_graphs.BucketGraphs.read

    def counted(graphs, model, parts, count):
        rows.append(([len(part) for part in parts], bucket_of(len(parts[0]))))
        return read(graphs, model, parts, count)

    monkeypatch.setattr(bucket_graphs.BucketGraphs, "read", counted)
    for cached in ({3, 16, 9}, {1, 3, 5, 16, 9, 40}):
        found = write(model, known if kept == "memory" else cache(), prompts)
        assert all(map(same, found, plain))
        assert {len(r.prompt_ids) for r in found if r.cached_tokens == len(r.prompt_ids)} >= cached
        assert bool(rows) == (cached != {1, 3, 5, 16, 9, 40})
        del rows[:]


def test_a_prompt_found_whole_begins_with_the_group_that_finds_it(model, monkeypatch):
    read_in_buckets(monkeypatch)
    cache, (known, new) = PrefixCache(model), tokens(2, 12)
    write(model, cache, [known])
    engine = Engine(model, 4, prefix_cache=cache, read_seconds=0)
    first, second = engine.submit(Request(new, max_new_tokens=3)), engine.submit(Request(known, max_new_tokens=3))
    engine.step()
    assert first.tokens
    assert second.tokens, "in the same step, though its time is one part's"
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)


def test_an_error_of_a_forward_is_not_that_of_prompts_found_whole(model, monkeypatch):
    read_in_buckets(monkeypatch)
    cache, (known, new) = PrefixCache(model), tokens(2, 12)
    (expected,) = write(model, cache, [known])
    engine = Engine(model, 4, prefix_cache=cache)
    first = engine.submit(Request(new, SAMPLINGS[1], 6))
    second = engine.submit(Request(known, SAMPLINGS[1], 6))

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_together", broken)
        for _ in engine.run():
            pass
    assert (first.finish_reason, second.finish_reason) == ("error", "length")
    assert second.tokens == expected.tokens


def test_logits_that_are_no_numbers_are_so_again(model):
    cache, prompt = PrefixCache(model), tokens(1, 5)[0]
    engine = Engine(model, 2, prefix_cache=cache)
    with torch.no_grad():
        known = cache.begin(prompt)
        model(prompt[None], cache_params=known.cache)
        known.reached(5, torch.full((1, 61), torch.nan))
    request = engine.submit(Request(prompt, Sampling(seed=1), 3))
    for _ in engine.run():
        pass
    assert request.cached_tokens == 5
    assert "logits are NaN" in request.error


def test_what_the_scheduler_counts(model, monkeypatch):
    """Tokens that are known cost their share nothing, in whole or in part."""
    cache, prompt = PrefixCache(model, chunk_size=8), tokens(1, 27)[0]
    write(model, cache, [prompt])
    for ids, read in ((prompt, 0), (torch.cat([prompt, prompt[:5]]), 5)):
        engine, counted = Engine(model, 2, 8, prefix_cache=cache), []
        monkeypatch.setattr(engine._schedule, "count_read", lambda text, tokens, to=counted: to.append(tokens))
        engine.write([Request(ids, max_new_tokens=1)])
        assert sum(counted) == read


def test_states_without_logits_serve_longer_prompts_alone(model, forwards, tmp_path):
    prompt = tokens(1, 20)[0]
    (plain,) = write(model, PrefixCache(model), [prompt])
    cache = PrefixCache(model, folder=tmp_path)
    cache.store(prompt, State.read(model, torch.cat([prompt, prompt[:1]])).cache)
    (old,) = tmp_path.rglob("20-*.safetensors")
    size = old.stat().st_size
    with safe_open(old, "pt") as file:
        assert set(file.metadata()) == {"format", "key", "sha256"}, "as the versions before wrote it"
    for one in (cache, PrefixCache(model, folder=tmp_path)):
        assert one.begin(prompt).position == 0
        assert one.begin(torch.cat([prompt, prompt])).position == 20
        assert (len(one), one.nbytes) == (1, ONE)
    del forwards[:]
    (cold,) = write(model, cache, [prompt])
    assert forwards == [20]
    (again,) = write(model, cache, [prompt])
    (later,) = write(model, PrefixCache(model, folder=tmp_path), [prompt])
    assert forwards == [20], "the logits were added, in memory and in the file"
    assert old.stat().st_size >= size + LOGITS
    assert all(same(one, plain) for one in (cold, again, later))
    assert cache.nbytes == 2 * ONE + LOGITS, "of the prompt and of the text"
    cache.store(prompt, State.read(model, torch.cat([prompt, prompt[:1]])).cache)
    assert cache.begin(prompt).logits is not None, "they are not lost either"
    assert PrefixCache(model, folder=tmp_path).begin(prompt).logits is not None


def test_another_process_adds_the_logits(model, tmp_path):
    """This one has the state without them in memory."""
    prompt, cache = tokens(1, 20)[0], PrefixCache(model, folder=tmp_path)
    cache.store(prompt, State.read(model, torch.cat([prompt, prompt[:1]])).cache)
    write(model, PrefixCache(model, folder=tmp_path), [prompt])
    found = cache.begin(prompt)
    assert (found.position, found.logits.shape) == (20, (1, 61))
    assert (len(cache), cache.nbytes) == (1, ONE + LOGITS)


def test_the_budget_counts_logits(model):
    cache = PrefixCache(model, memory_bytes=2 * (ONE + LOGITS))
    for prompt in tokens(3, 5):
        reading = cache.begin(prompt)
        reading.reached(5, torch.zeros(1, 61))
    assert (len(cache), cache.nbytes, cache.statistics.evictions) == (2, 2 * (ONE + LOGITS), 1)
    narrow = PrefixCache(model, memory_bytes=ONE)
    narrow.store(prompt, State.read(model, torch.cat([prompt, prompt[:1]])).cache)
    narrow.begin(prompt).reached(5, torch.zeros(1, 61))
    assert (len(narrow), narrow.nbytes) == (1, ONE), "the state alone fits, and stays"


def test_a_hit_s_logits_are_a_copy(model):
    cache, prompt = PrefixCache(model), tokens(1, 5)[0]
    write(model, cache, [prompt])
    first = cache.begin(prompt)
    kept = first.logits.clone()
    first.logits.zero_()
    assert torch.equal(cache.begin(prompt).logits, kept)


def changed(file: Path, change) -> None:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, a safe_open is no dict
        metadata = opened.metadata()
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def flip(tensors, metadata):
    tensors["logits"][0, 7] += 1


def drop(tensors, metadata):
    del tensors["logits"]


def reshape(tensors, metadata):
    tensors["logits"] = tensors["logits"][:, :60].contiguous()
    metadata["logits_sha256"] = prefix_files._digest({"logits": tensors["logits"]})


def retype(tensors, metadata):
    tensors["logits"] = tensors["logits"].bfloat16()
    metadata["logits_sha256"] = prefix_files._digest({"logits": tensors["logits"]})


@pytest.mark.parametrize("change", [flip, drop, reshape, retype], ids=lambda f: f.__name__)
@pytest.mark.parametrize("longer", [False, True])
def test_damaged_logits_are_read_again(model, tmp_path, change, longer):
    prompt = tokens(1, 20)[0]
    (expected,) = write(model, PrefixCache(model, folder=tmp_path / "whole"), [prompt])
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").rglob("20-*.safetensors")
    changed(file, change)
    asked = torch.cat([prompt, prompt[:3]]) if longer else prompt
    with pytest.warns(UserWarning, match="read again"):
        assert PrefixCache(model, folder=tmp_path / "damaged").begin(asked).position == 0
    assert not file.exists()
    (again,) = write(model, PrefixCache(model, folder=tmp_path / "damaged"), [prompt])
    assert same(again, expected)
    assert file.exists()


def test_read_leaves_the_last_token(model):
    """However a prompt was read before; and what it reads serves the engine."""
    prompt = tokens(1, 20)[0]
    plain, cache = State.read(model, prompt), PrefixCache(model, chunk_size=8)
    (text,) = write(model, cache, [prompt])
    for one in (cache, PrefixCache(model, chunk_size=8)):
        for _ in range(2):
            state = one.read(prompt)
            assert state.pending.tolist() == [prompt[-1:].tolist()]
            assert state.cache.get_seq_length() == 19
            torch.testing.assert_close(state.cache.ssm_states, plain.cache.ssm_states, rtol=1e-4, atol=1e-6)
    (after,) = write(model, one, [prompt])
    assert (after.tokens, after.cached_tokens) == (text.tokens, 19)


def test_a_scorer(model, forwards):
    prompt, cache, found = tokens(1, 20)[0], PrefixCache(model, chunk_size=8), []
    texts = tuple(array("q", one.tolist()).tobytes() for one in tokens(2, 4))
    for _ in range(2):
        scorer = Scorer(model, 8, prefix_cache=cache)
        options = TextOptions(continuations=texts)
        scorer.add(1, Task(1, array("q", prompt.tolist()).tobytes(), {}, 0, options=options), None, prompt[:0])
        while len(scorer):
            scorer.step(lambda _, result: found.append(result), pytest.fail)
    assert forwards == [8, 8, 4]
    assert [one.cached_tokens for one in found] == [0, 20]
    assert found[0].scores == found[1].scores
