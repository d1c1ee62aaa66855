"""Rows of states: put in, stepped together, taken out, left out, whichever way they are stepped."""

from __future__ import annotations

import random

import pytest
import torch

from mambakit.decoding.registry import kept_decoder
from mambakit.decoding.slots import SlotPool
from tests.decoding.eager_graph import decode_by
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return pair("untied")[0]


@torch.no_grad()
def test_rows_come_and_go(way, model):
    """Each text's logits and state are its own, and the state knows how much it has read."""
    rows = SlotPool(model, 5)
    assert rows.size == 0
    ids, lengths = tokens(3, 20), (4, 7, 5)
    at = {}  # text: row
    read = list(lengths)

    def step() -> None:
        new = torch.zeros(rows.size, dtype=torch.int64)
        for text, row in at.items():
            new[row] = ids[text, read[text]]
        logits = rows.step(new)
        for text, row in at.items():
            read[text] += 1
            assert worst(logits[row], model(ids[text : text + 1, : read[text]]).logits[0, -1]) < 1e-5

    def put(text: int) -> None:
        if len(at) == rows.size:
            before = rows.size
            assert rows.grow() == rows.size - before
        row = min(set(range(rows.size)) - set(at.values()))
        rows.put(row, model(ids[text : text + 1, : read[text]], use_cache=True).cache_params)
        at[text] = row

    def check(text: int) -> None:
        state = rows.copy_of(at[text])
        expected = model(ids[text : text + 1, : read[text]], use_cache=True).cache_params
        assert worst(state.ssm_states, expected.ssm_states) < 1e-5
        assert worst(state.conv_states, expected.conv_states) < 1e-5
        assert state.get_seq_length() == read[text]

    put(0)
    assert rows.by_forward == (way == "forward")
    assert rows.size == (1 if rows.elastic else 5)
    step()
    step()
    put(1)
    step()
    put(2)
    assert rows.size == (4 if rows.elastic else 5)
    step()
    for text in at:
        check(text)
    assert not rows.shrink([0, 1, 2]), "more than half"
    del at[0]
    shrunk = rows.shrink([at[1], at[2]])
    assert shrunk == rows.elastic == (way == "native")
    if shrunk:
        at = {1: 0, 2: 1}
        assert rows.size == 2
    step()
    read[0] = 3
    put(0)
    step()
    for text in at:
        check(text)


@torch.no_grad()
def test_over_a_cache(way, model):
    """Its states are up to date after `close`, and a way back is exact."""
    ids = tokens(3, 12)
    cache = model(ids[:, :6], use_cache=True).cache_params
    rows = SlotPool(model, 3, cache)
    rows.step(ids[:, 6])
    before = rows.snapshot()
    kept = rows.states.ssm_states.clone()
    first = rows.likeliest(ids[:, 7], 5)
    moved = rows.states.ssm_states.clone()
    rows.go_back(before)
    assert torch.equal(rows.states.ssm_states, kept)
    assert torch.equal(rows.likeliest(ids[:, 7], 5), first)
    assert torch.equal(rows.states.ssm_states, moved)
    rows.close()
    whole = torch.cat([ids[:, :8], first[:, :-1]], 1)
    result = model(whole, use_cache=True)
    assert torch.equal(result.logits[:, 7:].argmax(-1), first)
    assert worst(cache.ssm_states, result.cache_params.ssm_states) < 1e-5
    assert worst(cache.conv_states, result.cache_params.conv_states) < 1e-5
    assert cache.get_seq_length() == 12


def test_only_what_the_native_library_serves_is_elastic(model, monkeypatch):
    decode_by("native", monkeypatch)
    assert SlotPool(model, 32).elastic
    assert not SlotPool(model, 33).elastic, "33 rows are the forward's: its bits for one row would be others"
    assert not SlotPool(pair("gelu")[0], 4).elastic
    rows = SlotPool(model, 33)
    assert rows.grow() == 33


@torch.no_grad()
def test_bits_do_not_depend_on_the_rows_that_were_left_out(model, monkeypatch):
    decode_by("native", monkeypatch)
    ids = tokens(4, 8)
    cache = model(ids[:, :6], use_cache=True).cache_params
    stay, leave = SlotPool(model, 4, cache.clone()), SlotPool(model, 4, cache.clone())
    assert torch.equal(stay.step(ids[:, 6]), leave.step(ids[:, 6]))
    assert leave.shrink([3, 1])
    assert torch.equal(leave.step(ids[[3, 1], 7]), stay.step(ids[:, 7])[[3, 1]])


@pytest.mark.cuda
@torch.no_grad()
def test_rows_of_a_pool_are_not_those_of_generate():
    """The pool's graph is its own: a `generate` of as many rows in between leaves it alone."""
    model = pair("untied")[0].cuda()
    ids = tokens(2, 8).cuda()
    rows = SlotPool(model, 2)
    rows.grow()
    for row in range(2):
        rows.put(row, model(ids[row : row + 1, :6], use_cache=True).cache_params)
    rows.step(ids[:, 6])
    model.generate(ids, max_new_tokens=9, do_sample=False)
    assert rows._decoder is not kept_decoder(model, 2)
    assert worst(rows.step(ids[:, 7]), model(ids).logits[:, -1]) < 1e-4
    assert rows.copy_of(1).get_seq_length() == 8


@torch.no_grad()
@pytest.mark.parametrize("seed", range(40))
def test_random_growing_and_shrinking(seed, way, model):
    """Whatever order rows come, step and go in, what is kept per row is as long as the pool, and each row's own."""
    chance = random.Random(seed)
    most = chance.choice([1, 3, 5, 8])
    rows = SlotPool(model, most)
    texts: dict[int, list[int]] = {}  # name: its tokens
    name = 0
    for _ in range(25):
        action = chance.choice(["put", "put", "step", "step", "likeliest", "leave", "shrink"])
        if action == "put" and len(texts) < most:
            if None not in rows.occupants:
                rows.grow()
            row = chance.choice([i for i, held in enumerate(rows.occupants) if held is None])
            ids = tokens(1, chance.randrange(1, 6))
            rows.put(row, model(ids, use_cache=True).cache_params)
            rows.occupants[row], texts[name], name = name, ids[0].tolist(), name + 1
        elif action == "leave" and texts:
            gone = chance.choice(list(texts))
            del texts[gone]
            rows.occupants[rows.occupants.index(gone)] = None
        elif action == "shrink" and rows.size:
            rows.shrink([i for i, held in enumerate(rows.occupants) if held is not None])
        elif texts:
            new = [chance.randrange(1, 61) for _ in range(rows.size)]
            for row, held in enumerate(rows.occupants):
                if held is not None:
                    texts[held].append(new[row])
            if action == "likeliest":
                best = rows.likeliest(torch.tensor(new), 1)[:, 0]
                assert rows.are_numbers(best).all()
            else:
                rows.step(torch.tensor(new))
        assert len(rows._began) == len(rows.occupants) == rows.size <= most
        assert rows._last is None or rows.size in (0, len(rows._last))
        for row, held in enumerate(rows.occupants):
            if held is not None:
                assert rows.copy_of(row).get_seq_length() == len(texts[held])
    for row, held in enumerate(rows.occupants):
        if held is not None:
            expected = model(torch.tensor([texts[held]]), use_cache=True).cache_params
            assert worst(rows.copy_of(row).ssm_states, expected.ssm_states) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_drafts_are_verified_and_partly_kept(size, way, model):
    """Logits after every token of each draft; states after the kept tokens only; steps continue from there."""
    ids = tokens(size, 60)
    cache = model(ids[:, :6], use_cache=True).cache_params
    pool, read = SlotPool(model, size, cache), [6] * size
    chance = random.Random(size)

    def expected(slot: int, more: torch.Tensor) -> torch.Tensor:
        return model(torch.cat([ids[slot, : read[slot]], more])[None]).logits[0, read[slot] :]

    for turn, count in enumerate([4, 4, 2, 1, 5, 3]):
        draft = torch.stack([ids[i, read[i] : read[i] + count] for i in range(size)])
        before = pool.states.clone()
        logits = pool.verify(draft, most=5)
        assert logits.shape == (size, count, model.config.vocab_size)
        assert torch.equal(pool.states.ssm_states, before.ssm_states), "a verification changes no state"
        assert torch.equal(pool.states.conv_states, before.conv_states)
        for slot in range(size):
            assert worst(logits[slot], expected(slot, draft[slot])) < 1e-5
        kept = [0 if turn == 2 else chance.randrange(count + 1) for _ in range(size)]
        kept[-1] = count if turn == 1 else kept[-1]
        pool.commit(kept)
        read = [r + m for r, m in zip(read, kept, strict=True)]
        if turn % 2:
            step = torch.stack([ids[i, read[i]] for i in range(size)])
            logits = pool.step(step)
            for slot in range(size):
                assert worst(logits[slot], expected(slot, step[slot : slot + 1])[-1]) < 1e-5
            read = [r + 1 for r in read]
            with pytest.raises(ValueError, match="no draft"):
                pool.commit([1] * size)
        for slot in range(size):
            state = pool.copy_of(slot)
            assert state.get_seq_length() == read[slot]
            whole = model(ids[slot : slot + 1, : read[slot]], use_cache=True).cache_params
            assert worst(state.ssm_states, whole.ssm_states) < 1e-5
            assert worst(state.conv_states, whole.conv_states) < 1e-5
    pool.verify(torch.ones(size, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="commit of 3 tokens, but 2"):
        pool.commit([3] * size)
    pool.close()
    assert cache.get_seq_length() == max(read)


@torch.no_grad()
def test_going_back_takes_commits_back(way, model):
    ids = tokens(2, 20)
    pool = SlotPool(model, 2, model(ids[:, :6], use_cache=True).cache_params)
    before = pool.snapshot()
    pool.verify(ids[:, 6:9])
    pool.commit([3, 1])
    assert [pool.copy_of(i).get_seq_length() for i in range(2)] == [9, 7]
    pool.go_back(before)
    assert [pool.copy_of(i).get_seq_length() for i in range(2)] == [6, 6]
    logits = pool.verify(ids[:, 6:8])
    assert worst(logits[0], model(ids[:1, :8]).logits[0, 6:]) < 1e-5
