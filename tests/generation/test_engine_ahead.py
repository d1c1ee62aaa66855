"""Prompts that an engine reads before there is a slot: slots are refilled at once, and forwards of prompts are full."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from mambakit.decoding import bucket_graphs
from mambakit.decoding.loop import SlotLoop
from mambakit.decoding.slots import SlotPool
from mambakit.generation import reading
from mambakit.generation.engine import Engine, Request
from mambakit.generation.engine_prompts import PromptReader
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from mambakit.generation.turns import texts_ahead
from tests.decoding.eager_graph import decode_by, read_in_buckets
from tests.models.configurations import pair, worst

pytestmark = pytest.mark.filterwarnings("ignore")
STEP = 0.002  # seconds


@pytest.fixture
def model():
    model = pair("untied")[0]
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Prompts are read as on a GPU. The number of prompts of each forward."""
    decode_by("graph", monkeypatch)
    read_in_buckets(monkeypatch)
    found: list[int] = []
    read = bucket_graphs.BucketGraphs.read

    def counted(graphs, model, tokens, rows):
        found.append(len(tokens))
        return read(graphs, model, tokens, rows)

    monkeypatch.setattr(bucket_graphs.BucketGraphs, "read", counted)
    return found


class Load:
    """As many texts at an engine at any time, each with its own prompt and length."""

    def __init__(self, engine: Engine, count: int, tokens: int, share=lambda number: ()):
        self.engine, self.tokens, self.share = engine, tokens, share
        self.chance, self.numbers = random.Random(0), itertools.count()
        self.generator = torch.Generator().manual_seed(0)
        self.requests: list[Request] = []
        for _ in range(count):
            self.submit()

    def submit(self) -> None:
        number = next(self.numbers)
        ids = torch.randint(1, 61, (self.tokens - number % 9,), generator=self.generator)
        request = Request(
            ids, Sampling(0.8, seed=number), self.chance.randrange(8, 40), share=self.share(number),
        )  # fmt: skip
        self.requests.append(self.engine.submit(request))

    def run(self, steps: int, after=lambda: None) -> None:
        """Steps of the engine; each text that has ended is followed by another."""
        for _ in range(steps):
            there = len(self.engine._schedule)
            self.engine.step()
            after()
            for _ in range(there - len(self.engine._schedule)):
                self.submit()

    def check(self, every: int = 7) -> None:
        """Texts are those of an engine that has nothing else to do."""
        done = [request for request in self.requests if request.finish_reason]
        assert len(done) > 20
        for request in done[::every]:
            same = Request(request.prompt_ids, request.sampling, request.max_new_tokens)
            Engine(self.engine.model, self.engine.slots).write([same])
            assert request.tokens == same.tokens


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass where work is done: a layer of a prompt takes as long as a step."""
    now = 0.0
    parts, step = reading.prefill_parts, SlotPool.step

    def timed_parts(model, ids, cache):
        nonlocal now
        whole = parts(model, ids, cache)
        while True:
            now += STEP
            try:
                next(whole)
            except StopIteration as end:
                return end.value
            yield

    def timed_step(pool, given):
        nonlocal now
        now += STEP
        return step(pool, given)

    monkeypatch.setattr(reading, "prefill_parts", timed_parts)
    monkeypatch.setattr(SlotPool, "step", timed_step)
    return lambda: now


def test_no_slot_is_idle_while_its_next_prompt_is_read(model, clock):
    """On a CPU, where a prompt takes two steps between which others write."""
    engine = Engine(model, 4, read_seconds=STEP, clock=clock)
    load = Load(engine, 12, tokens=12)
    while engine._taken < 4:
        engine.step()
    counts: list[int] = []

    def after() -> None:
        counts.append(sum(len(request.tokens) for request in load.requests))
        assert len(engine._schedule.ready) <= texts_ahead(4)

    load.run(300, after)
    first = sum(bool(request.tokens) for request in load.requests)  # of a prompt, not of a slot
    assert (counts[-1] - counts[0] - first) / (4 * len(counts)) > 0.95, "slots that wrote in a step"
    load.check()


def test_a_gap_between_tokens_is_no_longer_for_what_is_read_ahead(model, clock):
    engine = Engine(model, 4, read_seconds=STEP, clock=clock)
    load = Load(engine, 12, tokens=12)
    while engine._taken < 4:
        engine.step()
    times = [clock()]
    load.run(200, lambda: times.append(clock()))
    # `read_seconds` for prompts, which a layer may exceed; the step; and what was begun at its end.
    assert max(b - a for a, b in itertools.pairwise(times)) < 3.5 * STEP


@pytest.mark.parametrize("shares", [1, 3])
def test_forwards_of_prompts_are_full(model, forwards, shares):
    """Prompts of 128 tokens are read four at a time, and no slot waits for that."""
    engine = Engine(model, 32, tokens_per_look=1)
    load = Load(engine, 32 + 12, tokens=120, share=lambda number: ("key", number % shares))
    load.run(10)
    del forwards[:]
    before = sum(len(request.tokens) for request in load.requests)
    load.run(200)
    assert sum(forwards) > 100
    assert sum(forwards) / len(forwards) > 3.4
    tokens = sum(len(request.tokens) for request in load.requests) - before
    if shares == 1:
        tokens -= sum(bool(request.tokens) for request in load.requests[44:])  # of a prompt, not of a slot
        assert tokens / (32 * 200) > 0.97, "slots that wrote in a step"
    assert len(engine._schedule.ready) <= texts_ahead(32) + 4 * shares
    load.check(every=29)


def test_prompts_wait_for_each_other_where_few_slots_are_idle(model, forwards):
    """As many clients as slots, each with a request of its own: nothing can be read ahead."""
    engine = Engine(model, 64, tokens_per_look=1)
    load = Load(engine, 64, tokens=120, share=lambda number: ("key", number))
    load.run(30)
    del forwards[:]
    began = len(load.requests)
    waited: dict[Request, int] = {}

    def after() -> None:
        for text in engine._schedule.unread:
            waited[text.request] = waited.get(text.request, 0) + 1

    load.run(100, after)
    assert len(load.requests) - began > 100
    assert sum(forwards) / len(forwards) > 3.4
    assert max(waited.values()) <= 2, "steps"
    load.check(every=41)


def test_a_newcomer_to_few_texts_is_read_at_once(model, forwards):
    engine = Engine(model, 64, tokens_per_look=1)
    for i in range(3):
        request = engine.submit(Request(torch.arange(1, 60), max_new_tokens=30, share=(i,)))
        engine.step()
        assert request.tokens
    assert forwards == [1, 1, 1]


def test_a_newcomer_of_another_share_has_its_first_token_soon(model, forwards):
    """Though all slots are taken, and others of its length are read ahead."""
    engine = Engine(model, 16, tokens_per_look=1)
    load = Load(engine, 30, tokens=120, share=lambda number: ("big",))
    load.run(40)
    for number in range(5):
        request = engine.submit(Request(torch.arange(1, 50 + number), max_new_tokens=3, share=("small", number)))
        load.run(3)
        assert request.tokens


def test_prompts_that_share_no_forward_are_read_ahead_where_none_is_ready(model, forwards):
    engine = Engine(model, 2, tokens_per_look=1)
    for length in (20, 20, 60, 120, 120):
        engine.submit(Request(torch.arange(length) % 60 + 1, max_new_tokens=30))
    for _ in range(6):
        engine.step()
    assert [text.request.prompt_ids.shape[0] for text in engine._schedule.ready] == [60]
    assert forwards == [2, 1], "the next waits until a slot is free"


@pytest.mark.parametrize("way", ["cpu", "buckets"])
def test_what_was_read_ahead_may_be_cancelled_and_is_not_busy(model, request, way):
    if way == "buckets":
        request.getfixturevalue("forwards")
    cache = PrefixCache(model, chunk_size=64)
    engine = Engine(model, 2, prefix_cache=cache, read_seconds=math.inf, tokens_per_look=1)
    prompts = [torch.randint(1, 61, (20,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    requests = [engine.submit(Request(p, max_new_tokens=12, keep_state=True)) for p in prompts]
    for _ in range(3):
        engine.step()
    ready = [text.request for text in engine._schedule.ready]
    assert ready == requests[2:4]
    assert [len(request.tokens) for request in ready] == [1, 1], "their first tokens are given out"
    assert engine.waiting == requests[4:]
    assert engine.busy == 2
    ready[0].cancel()
    engine.step()
    assert (ready[0].finish_reason, ready[0].final_state.get_seq_length()) == ("cancelled", 20)
    if way == "cpu":  # elsewhere the next is not read alone, as long as one is ready
        assert [text.request for text in engine._schedule.ready] == [requests[3], requests[4]]
    else:
        assert [text.request for text in engine._schedule.ready] == [requests[3]]
    for _ in engine.run():
        pass
    assert not engine._states._copies
    for one in (*requests[:2], *requests[3:]):
        (same,) = Engine(model, 2).write([Request(one.prompt_ids, max_new_tokens=12)])
        assert one.tokens == same.tokens
        read = torch.cat([one.prompt_ids, torch.tensor(one.tokens[:-1])])
        expected = model(read[None], use_cache=True).cache_params
        assert worst(one.final_state.ssm_states, expected.ssm_states) < 1e-4


@pytest.mark.parametrize("way", ["cpu", "buckets"])
def test_states_and_one_prompt_of_several_texts_are_read_ahead(model, request, way):
    forwards = request.getfixturevalue("forwards") if way == "buckets" else None
    state = model(torch.arange(1, 9)[None], use_cache=True).cache_params.detach()
    same = torch.arange(5, 35)

    def requests():
        several = [Request(same, Sampling(seed=i), 6 + i, share=("key", "several")) for i in range(6)]
        goes_on = [Request(same, Sampling(0), 9, state=state, share=("key", i)) for i in range(2)]
        return several + goes_on

    engine = Engine(model, 2)
    found = [engine.submit(one) for one in requests()]
    for _ in engine.run():
        pass
    for one, other in zip(found, requests(), strict=True):
        other.share = ()
        Engine(model, 2).write([other])
        assert one.tokens == other.tokens
    if forwards is not None:
        assert sum(forwards[: len(forwards) - 8]) <= 3, "the prompt of six once, and those with a state"


def test_first_tokens_are_waited_for_behind_the_next_look(model, forwards, monkeypatch):
    """Else the device had nothing to do from the end of the prompts until the host has seated their texts."""
    events, launch, collect, start = [], SlotLoop.launch, PromptReader.collect, PromptReader._start
    monkeypatch.setattr(SlotLoop, "launch", lambda self, count: events.append("look") or launch(self, count))
    monkeypatch.setattr(PromptReader, "collect", lambda self, *how: events.append("first") or collect(self, *how))

    def started(self, texts, failed):
        events.extend(["prompts"] * bool(texts))
        start(self, texts, failed)

    monkeypatch.setattr(PromptReader, "_start", started)
    engine = Engine(model, 4, tokens_per_look=4, read_seconds=60)
    prompts = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    alone = [Engine(model, 4).write([Request(ids, Sampling(seed=1), 30)])[0].tokens for ids in prompts]
    events.clear()
    first = engine.submit(Request(prompts[0], Sampling(seed=1), 30))
    engine.step()
    assert events == ["prompts", "first", "look"], "nothing is written yet: nothing to wait behind"
    others = [engine.submit(Request(ids, Sampling(seed=1), 30)) for ids in prompts[1:]]
    events.clear()
    engine.step()
    assert events == ["prompts", "look", "first"]
    assert [len(r.tokens) for r in others] == [1, 1]
    for _ in engine.run():
        pass
    assert [r.tokens for r in (first, *others)] == alone


def test_a_text_that_is_cancelled_before_its_first_token_is_on_the_host(model, forwards, monkeypatch):
    engine = Engine(model, 4, tokens_per_look=4, read_seconds=60)
    ids = torch.arange(1, 10)
    writing = engine.submit(Request(ids, Sampling(seed=1), 30))
    engine.step()
    cancelled = engine.submit(Request(ids, Sampling(seed=2), 30, keep_state=True))
    failing = engine.submit(Request(ids, Sampling(seed=2), 30))
    launch = SlotLoop.launch

    def meanwhile(self, count):
        if cancelled in engine._schedule.texts and not cancelled.finish_reason:
            assert len(engine._schedule.starting) == 2
            assert engine.busy == 3
            cancelled.cancel()
            engine._fail(engine._schedule.texts[failing], RuntimeError("meanwhile"))
        return launch(self, count)

    monkeypatch.setattr(SlotLoop, "launch", meanwhile)
    for _ in engine.run():
        pass
    assert (writing.finish_reason, len(writing.tokens)) == ("length", 30)
    assert (cancelled.finish_reason, len(cancelled.tokens)) == ("cancelled", 1)
    assert (failing.finish_reason, failing.tokens) == ("error", [])
    assert engine.busy == len(engine._schedule) == 0
