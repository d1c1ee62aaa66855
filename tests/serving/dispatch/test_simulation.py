"""The dispatcher alone on simulated time: 100,000 requests of several keys on replicas that are too few and die."""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import random
from array import array
from collections import Counter, defaultdict
from typing import Any

import pytest

from mambakit.generation.turns import Turns
from mambakit.serving.dispatch.dispatcher import Dispatcher
from mambakit.serving.dispatch.jobs import Job
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Cancel, Piece, Task
from mambakit.serving.metrics import Metrics

SLOTS, REPLICAS, LIMIT = 16, 4, 120
LOOK, TOKENS = 0.01, 8  # seconds, and the tokens that each slot writes in them
REQUESTS = 100_000


class Client:
    """Where a request's pieces go."""

    def __init__(self, world: World, key: str, **asked: Any):
        self.world, self.key, self.asked = world, key, asked
        self.address = next(world.numbers)
        self.refusals: list[tuple[float, int]] = []  # when, and the seconds it was told to wait
        self.outcome = ""
        self.first = self.last = math.nan
        self.jobs: list[Job] = []

    def ask(self) -> None:
        world, asked = self.world, dict(self.asked)
        within = asked.pop("within", math.inf)
        share = (self.key, self.address, next(world.numbers))
        jobs = [Job(self, i, deadline=world.now + within, share=share, **asked) for i in range(1)]  # type: ignore[arg-type]
        try:
            world.dispatcher.submit(jobs)
        except ApiError as error:
            self.refusals.append((world.now, error.retry_after))  # type: ignore[arg-type]
            if len(self.refusals) < 20:
                world.at(world.now + error.retry_after, self.ask)
            else:
                self.outcome = "gave up"
            return
        self.jobs = jobs

    def put(self, index: int, piece: Piece) -> None:
        if math.isnan(self.first):
            self.first = self.world.now
        if piece.finish_reason and all(job.ended or job.index == index for job in self.jobs):
            self.outcome, self.last = "done", self.world.now

    def fail(self, error: ApiError) -> None:
        self.outcome = f"{error.status} {error.code or ''}".strip()
        self.last = self.world.now


class World:
    """Args: whether a replica's engine lets the texts that it has take turns for its slots, as the real one does."""

    def __init__(self, seed: int, turns: bool = False):
        self.chance = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Any]] = []
        self.numbers = itertools.count()
        self.dispatcher = Dispatcher(
            ["cpu"] * REPLICAS, slots=SLOTS, max_waiting=LIMIT, metrics=Metrics(), caching=True,
            clock=lambda: self.now,
        )  # fmt: skip
        self.turns = turns
        self.clients: list[Client] = []
        self.written: Counter = Counter()  # tokens by key
        self.at_replica: dict[int, dict[int, Task]] = {r.number: {} for r in self.dispatcher.replicas}
        self.left: dict[int, int] = {}  # by task: prompt's looks and tokens left
        self.sent: set[int] = set()
        self.idle_slots = self.busy_slots = 0
        self.placed: dict[bytes, int] = {}
        self.followed: Counter = Counter()
        for replica in self.dispatcher.replicas:
            self.dispatcher.ready(replica)

    def at(self, when: float, call: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), call))

    def look(self) -> None:
        """Every replica makes a step."""
        dispatcher = self.dispatcher
        while self.events and self.events[0][0] <= self.now:
            heapq.heappop(self.events)[2]()
        dispatcher.expire()
        for replica in dispatcher.replicas:
            if replica.state != "ready":
                continue
            tasks, pieces = self.at_replica[replica.number], []
            while not replica.outgoing.empty():
                message = replica.outgoing.get()
                if isinstance(message, Task):
                    assert message.id not in self.sent, "a text is sent once"
                    self.sent.add(message.id)
                    tasks[message.id] = message
                    self.left[message.id] = message.max_new_tokens
                    self._note(message, replica.number)
                elif isinstance(message, Cancel) and tasks.pop(message.id, None) is not None:
                    pieces.append(Piece(message.id, finish_reason="cancelled"))
            if len(dispatcher._queue):
                self.idle_slots += max(0, SLOTS - len(tasks))
                self.busy_slots += min(SLOTS, len(tasks))
            for id, task in self._seated(tasks):
                tokens = min(TOKENS, self.left[id])
                self.left[id] -= tokens
                self.written[task.share[0]] += tokens
                if not self.left[id]:
                    del tasks[id]
                pieces.append(Piece(id, "x", tokens, "" if self.left[id] else "length"))
            dispatcher.receive(replica, Batch(min(SLOTS, len(tasks)), 0, pieces))
        self.now += LOOK

    def _seated(self, tasks: dict[int, Task]) -> list[tuple[int, Task]]:
        """The tasks that have a slot."""
        if not self.turns:
            return list(itertools.islice(tasks.items(), SLOTS))
        turns: Turns[int] = Turns()
        for id, task in tasks.items():
            turns.add(id, task.share)
        return [(id, tasks[id]) for id in turns.next(SLOTS)]

    def _note(self, task: Task, replica: int) -> None:
        begin = task.prompt_ids[:800]
        if len(begin) == 800:
            if begin in self.placed:
                self.followed[self.placed[begin] == replica] += 1
            self.placed[begin] = replica

    def kill(self) -> None:
        replica = self.chance.choice(self.dispatcher.replicas)
        if replica.state != "ready":
            return
        self.at_replica[replica.number].clear()
        self.dispatcher.lost(replica, "killed by signal 9")
        replica.outgoing = queue.SimpleQueue()
        replica.state, replica.began = "loading", self.now
        self.at(self.now + 1, lambda: self.dispatcher.ready(replica))

    def run_out(self) -> None:
        end = self.now + 10_000
        while (self.events or any(self.at_replica.values()) or len(self.dispatcher._queue)) and self.now < end:
            self.look()
        for _ in range(3):
            self.look()
        assert self.now < end


def prompt(chance: random.Random, tokens: int, conversation: int | None = None) -> bytes:
    if conversation is not None:
        tokens = 100 + tokens
    begin = array("q", [conversation or 0] * min(tokens, 100) if conversation is not None else [])
    return (begin + array("q", [chance.randrange(1000)] * (tokens - len(begin)))).tobytes()


@pytest.fixture(scope="module")
def overloaded() -> World:
    """Bursts of twice what the replicas can write, three seconds of ten; 100,000 requests."""
    world = World(0)
    chance = world.chance
    per_second = REPLICAS * SLOTS * TOKENS / LOOK / 32  # texts of 32 tokens on average
    when = 0.0
    for number in range(REQUESTS):
        when += chance.expovariate(per_second * (2.0 if int(when) % 10 < 3 else 0.5))
        key = chance.choice("aaaabbc")
        tokens = chance.choice([1, 8, 16, 32, 64, 64])
        ids = prompt(chance, chance.randrange(1, 60), chance.randrange(1, 400) if chance.random() < 0.3 else None)
        asked = {"prompt_ids": ids, "prompt_tokens": len(ids) // 8, "sampling": {}, "max_new_tokens": tokens}
        if key == "c":
            asked["priority"] = chance.choice([-1, 0, 0, 0])
        if chance.random() < 0.1:
            asked["within"] = chance.choice([0.02, 0.1, 0.5, 2.0])
        gone = chance.random() < 0.02

        def arrive(key: str = key, asked: dict = asked, gone: bool = gone) -> None:
            client = Client(world, key, **asked)
            world.clients.append(client)
            client.ask()
            if gone:
                world.at(world.now + 0.05, lambda: world.dispatcher.cancel(client.jobs))

        world.at(when, arrive)
        if number % 20_000 == 10_000:
            world.at(when, world.kill)
    world.run_out()
    return world


def test_every_request_ends_and_nothing_is_left(overloaded):
    assert len(overloaded.clients) == REQUESTS
    cancelled = 0
    for client in overloaded.clients:
        if not client.outcome:
            assert client.jobs
            assert all(job.ended for job in client.jobs)
            cancelled += 1
    outcomes = Counter(client.outcome for client in overloaded.clients)
    assert cancelled < 0.02 * REQUESTS
    assert set(outcomes) <= {"", "done", "503", "504 deadline_exceeded", "gave up"}
    assert outcomes["503"] <= 5 * (SLOTS * 4 + 2), "no more than what dying replicas had"
    assert outcomes["done"] > 0.9 * REQUESTS
    dispatcher = overloaded.dispatcher
    assert dispatcher.waiting == 0
    assert not dispatcher._queue._texts._leaves
    assert not dispatcher._queue._texts._root.children
    for replica in dispatcher.replicas:
        assert not replica.jobs
        assert len(replica.shares) == 0
        assert replica.work == 0


def test_no_slot_is_empty_while_a_text_waits(overloaded):
    assert overloaded.idle_slots < 0.01 * overloaded.busy_slots, "but for those of a replica in its first look"


def test_retry_after_is_true(overloaded):
    """Most who return when told to are accepted at once, though each second brings thirteen times as many texts as may
    wait; and none was told to wait for so long that slots were empty meanwhile (the test above)."""
    returned = [client for client in overloaded.clients if client.refusals]
    assert len(returned) > 1000
    accepted = sum(len(client.refusals) == 1 for client in returned)
    assert accepted > 0.75 * len(returned), f"{accepted} of {len(returned)}"
    assert max(seconds for client in returned for _, seconds in client.refusals) < 60


def test_deadlines(overloaded):
    late = done = 0
    for client in overloaded.clients:
        if (within := client.asked.get("within")) is None or not client.jobs:
            continue
        asked = client.jobs[0].created
        if client.outcome == "done":
            assert client.last <= asked + within + 2 * LOOK
            done += 1
        elif client.outcome.startswith("504"):
            assert asked + within - 1e-9 <= client.last <= asked + within + 2 * LOOK
            late += 1
    assert late > 100
    assert done > 100


def test_a_key_s_higher_priority_waits_less(overloaded):
    waits = defaultdict(list)
    for client in overloaded.clients:
        if client.key == "c" and client.outcome == "done" and "within" not in client.asked:
            waits[client.asked["priority"]].append(client.first - client.jobs[0].created)
    mean = {priority: sum(found) / len(found) for priority, found in waits.items()}
    assert mean[-1] <= mean[0]


def test_keys_that_always_wait_have_their_shares():
    """However many texts each asks for, and however long they are."""
    world = World(1, turns=True)
    length = {"a": 64, "b": 16, "c": 200}
    for _ in range(600):
        for key, many in (("a", 60), ("b", 30), ("c", 25)):
            there = sum(job.share[0] == key for job in world.dispatcher._queue)
            for _ in range(many - there):
                Client(world, key, prompt_ids=b"", prompt_tokens=1, sampling={}, max_new_tokens=length[key]).ask()
        world.events.clear()
        world.look()
    for key in "abc":
        assert world.written[key] / sum(world.written.values()) == pytest.approx(1 / 3, rel=0.2), world.written


def test_at_half_the_load_prompts_follow_their_conversation():
    world = World(2)
    chance = world.chance
    for i in range(4000):
        ids = prompt(chance, 30, 1 + i % 200)
        asked = {"prompt_ids": ids, "prompt_tokens": len(ids) // 8, "sampling": {}, "max_new_tokens": 16}
        world.at(i * 0.001, lambda asked=asked: Client(world, "a", **asked).ask())
    world.run_out()
    assert world.followed[True] > 0.7 * sum(world.followed.values()), world.followed
