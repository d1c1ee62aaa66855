"""Turns in the engine, by a fake clock: prompts are read while others decode, and nobody holds all slots for long."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mambakit.decoding import prefill as prompt
from mambakit.decoding.slots import SlotPool
from mambakit.generation import reading
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from tests.models.configurations import NAMES, pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LAYER, STEP = 0.0001, 0.002  # seconds: of a prompt's token in one of two layers, and of a step
PROMPT_SHARE = 0.02  # the engine's default time for reading


class Time:
    """Seconds that pass where work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        parts, step = reading.prefill_parts, SlotPool.step

        def timed_parts(model, ids, cache):
            whole = parts(model, ids, cache)
            while True:
                self.now += LAYER * ids.shape[1]
                try:
                    next(whole)
                except StopIteration as end:
                    return end.value
                yield

        def timed_step(rows, given):
            self.now += STEP
            return step(rows, given)

        monkeypatch.setattr(reading, "prefill_parts", timed_parts)
        monkeypatch.setattr(SlotPool, "step", timed_step)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Time:
    return Time(monkeypatch)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = pair("untied")[0]
    model.generation_config.eos_token_id = None
    return model


def run(engine: Engine, clock: Time, until=lambda: False) -> dict[Request, list[float]]:
    """When each token came."""
    times: dict[Request, list[float]] = {}
    while len(engine._schedule) and not until():
        for request, _ in engine.step():
            times.setdefault(request, []).append(clock.now)
    return times


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("cached", [False, True])
def test_a_long_prompt_holds_up_neither_writers_nor_newcomers(model, clock, cached):
    cache = PrefixCache(model, chunk_size=64) if cached else None
    engine = Engine(model, 4, chunk_size=64, prefix_cache=cache, clock=clock)
    writer = engine.submit(Request(tokens(1, 5)[0], max_new_tokens=1000))
    run(engine, clock, lambda: len(writer.tokens) > 3)
    long = engine.submit(Request(tokens(1, 6000)[0], max_new_tokens=2))
    run(engine, clock, lambda: clock.now > 0.4)
    assert 0 < long.prompt_ids.shape[0] - next(iter(engine._schedule.unread)).reading.left < 6000, "in the middle"
    came = clock.now
    newcomer = engine.submit(Request(tokens(1, 1)[0], max_new_tokens=1))
    late = engine.submit(Request(tokens(1, 1)[0], max_new_tokens=20))
    times = run(engine, clock)
    assert times[newcomer][0] - came < 2 * (PROMPT_SHARE + STEP)
    assert times[late][0] - came < 2 * (PROMPT_SHARE + STEP)
    for request in (writer, late):
        assert max(gaps(times[request])) <= PROMPT_SHARE + STEP + 64 * LAYER
    assert len(long.tokens) == 2
    assert len(writer.tokens) == 1000


def test_reading_a_chunk_is_interrupted_between_layers(model, clock):
    """A chunk that takes longer than the time for reading holds others up for one of its layers."""
    engine = Engine(model, 4, chunk_size=1000, read_seconds=0.01, clock=clock)
    writer = engine.submit(Request(tokens(1, 5)[0], max_new_tokens=200))
    run(engine, clock, lambda: len(writer.tokens) > 3)
    engine.submit(Request(tokens(1, 5000)[0], max_new_tokens=1))
    times = run(engine, clock)
    assert max(gaps(times[writer])) == pytest.approx(1000 * LAYER + STEP)
    assert sorted(gaps(times[writer]))[-8] > 0.9 * 1000 * LAYER


def test_the_shortest_rest_is_next_and_the_first_is_not_forgotten(model, clock):
    """While shorter prompts keep coming, a long one gets on with a quarter of the time."""
    engine = Engine(model, 3, chunk_size=50, clock=clock)
    long = engine.submit(Request(tokens(1, 2000)[0], max_new_tokens=1, share=("long",)))
    engine.step()
    firsts: list[float] = []
    asked = 0
    while not long.finish_reason:
        asked += 1
        short, came = Request(tokens(1, 150)[0], max_new_tokens=1, share=(asked,)), clock.now
        engine.submit(short)
        while not short.finish_reason:
            engine.step()
        firsts.append(clock.now - came)
    alone = 2000 * LAYER * 3  # two layers and the end
    assert alone < clock.now < 6 * alone
    assert asked > 10
    assert sorted(firsts)[len(firsts) // 2] < 3 * 150 * LAYER * 3


def test_cancelling_in_the_middle_of_a_prompt(model, clock):
    cache = PrefixCache(model, chunk_size=32)
    engine = Engine(model, 2, chunk_size=32, read_seconds=0, prefix_cache=cache, clock=clock)
    ids = tokens(1, 300)[0]
    gone = engine.submit(Request(ids, max_new_tokens=5))
    for _ in range(20):
        engine.step()
    gone.cancel()
    engine.step()
    assert (gone.finish_reason, gone.tokens, engine.busy) == ("cancelled", [], 0)
    again = engine.submit(Request(ids, max_new_tokens=5))
    run(engine, clock)
    assert again.cached_tokens > 0, "what was read is known"
    (same,) = Engine(model, 2, chunk_size=32).write([Request(ids, max_new_tokens=5)])
    assert again.tokens == same.tokens


def test_one_request_with_many_texts_makes_nobody_wait(model, clock):
    engine = Engine(model, 8, clock=clock)
    ids = tokens(1, 3)[0]
    big = [engine.submit(Request(ids, Sampling(seed=i), max_new_tokens=150, share=("key", "big"))) for i in range(40)]
    run(engine, clock, lambda: len(big[0].tokens) > 40)
    came = clock.now
    small = engine.submit(Request(tokens(1, 4)[0], max_new_tokens=60, share=("key", "small")))
    other = [engine.submit(Request(tokens(1, 4)[0], max_new_tokens=60, share=("other", i))) for i in range(3)]
    times = run(engine, clock, lambda: all(request.finish_reason for request in [small, *other]))
    for request in [small, *other]:
        assert times[request][0] - came < 0.03
        assert times[request][-1] - came < 61 * (STEP + PROMPT_SHARE / 10), (
            "at once, and with a row of its own to the end"
        )
    run(engine, clock)
    for i in (0, 7, 8, 39):
        (single,) = Engine(model, 8).write([Request(ids, Sampling(seed=i), max_new_tokens=150)])
        assert big[i].tokens == single.tokens, "whatever it made room for"


def test_more_requests_than_rows_take_turns(model, clock):
    engine = Engine(model, 2, slice_tokens=8, clock=clock)
    requests = [engine.submit(Request(tokens(1, 3)[0], max_new_tokens=400, share=(i,))) for i in range(6)]
    for _ in range(300):
        engine.step()
    written = [len(request.tokens) for request in requests]
    assert min(written) > 80
    assert max(written) - min(written) <= 2 * 8 + 2


def test_rows_are_divided_between_keys_however_many_requests_each_has(model, clock):
    engine = Engine(model, 4, slice_tokens=4, clock=clock)
    crowd = [engine.submit(Request(tokens(1, 3)[0], max_new_tokens=500, share=("crowd", i))) for i in range(9)]
    pair_ = [engine.submit(Request(tokens(1, 3)[0], max_new_tokens=500, share=("two", 0))) for i in range(2)]
    for _ in range(200):
        engine.step()
    assert sum(len(r.tokens) for r in pair_) == pytest.approx(sum(len(r.tokens) for r in crowd), rel=0.2)


def test_texts_of_one_prompt_read_it_once(model, monkeypatch):
    read = []
    parts = reading.prefill_parts
    monkeypatch.setattr(reading, "prefill_parts", lambda m, ids, c: read.append(ids.shape[1]) or parts(m, ids, c))
    ids = tokens(1, 100)[0]
    engine = Engine(model, 3, chunk_size=30)
    texts = engine.write(Request(ids, Sampling(seed=i), max_new_tokens=5, share=("request",)) for i in range(10))
    assert sum(read) == 100
    assert not engine._prompts._held, "nothing is held when nobody is left"
    for i in (0, 9):
        assert texts[i].tokens == Engine(model, 3, chunk_size=30).write([Request(ids, Sampling(seed=i), 5)])[0].tokens


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_read_in_parts_has_the_same_bits(name):
    model = pair(name)[0]
    ids = tokens(1, 40)
    whole, parts = model.backbone.new_cache(1), model.backbone.new_cache(1)
    for piece in (ids[:, :25], ids[:, 25:39], ids[:, 39:]):
        expected = prompt.prefill(model, piece, whole)
        generator, count = prompt.prefill_parts(model, piece, parts), 0
        while True:
            try:
                next(generator)
                count += 1
            except StopIteration as end:
                logits = end.value
                break
        assert count == len(model.backbone.layers)
        assert torch.equal(logits, expected)
        assert logits.dtype == expected.dtype
        assert torch.equal(parts.ssm_states, whole.ssm_states)
        assert torch.equal(parts.conv_states, whole.conv_states)
        assert parts.get_seq_length() == whole.get_seq_length()


@torch.no_grad()
@pytest.mark.parametrize("where", ["model", "backbone"])
def test_whoever_listens_to_the_whole_model_hears_it(model, where):
    heard = []
    module = model if where == "model" else model.backbone
    hook = module.register_forward_hook(lambda *_: heard.append(1))
    try:
        Engine(model, 1, read_seconds=math.inf).write([Request(tokens(1, 9)[0], max_new_tokens=1)])
    finally:
        hook.remove()
    assert heard == [1]
    forward = module.forward
    module.forward = lambda *a, **k: heard.append(2) or forward(*a, **k)
    try:
        Engine(model, 1, read_seconds=math.inf).write([Request(tokens(1, 9)[0], max_new_tokens=1)])
    finally:
        del module.forward
    assert heard == [1, 2]


def test_texts_that_nobody_listens_to_start_together(model, clock):
    """`write` of an idle engine reads all prompts first; beside others it keeps to the time."""

    def requests():
        return [Request(tokens(1, 60)[0], max_new_tokens=9) for _ in range(4)]

    engine, steps = Engine(model, 5, clock=clock), 8 * STEP
    reading_time = 4 * 60 * 3 * LAYER  # two layers, and what follows the last
    assert reading_time > 2 * PROMPT_SHARE
    began = clock.now
    written = engine.write(requests())
    assert clock.now - began == pytest.approx(reading_time + steps)
    other = engine.submit(Request(tokens(1, 60)[0], max_new_tokens=100))
    engine.step()
    times: dict[Request, list[float]] = {}
    step = engine.step

    def noted():
        found = step()
        for request, _ in found:
            times.setdefault(request, []).append(clock.now)
        return found

    engine.step = noted
    engine.write(requests())
    assert max(gaps(times[other])) <= PROMPT_SHARE + 60 * LAYER + STEP
    assert all(len(request.tokens) == 9 for request in written)
