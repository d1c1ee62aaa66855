"""The fair queue chooses the texts that `Turns` chooses, which looks at all of them."""

from __future__ import annotations

import contextlib
import math
import random

import pytest

from mambakit.generation.turns import Turns
from mambakit.serving.dispatch.affinity import Affinity, marks_of, positions
from mambakit.serving.dispatch.fair_queue import FairQueue
from mambakit.serving.dispatch.jobs import Inbox, Job


def job(share: tuple, priority: int = 0, deadline: float = math.inf) -> Job:
    return Job(Inbox(), 0, b"", 1, {}, 10, share=share, priority=priority, deadline=deadline)


def first(queue: FairQueue) -> Job:
    with contextlib.closing(queue.next()) as turns:
        return next(turns)


@pytest.mark.parametrize("seed", range(20))
def test_as_turns(seed):
    """Random arrivals and ends: the shares of a choice are even at every level, as `Turns` has them."""
    chance, queue, turns = random.Random(seed), FairQueue(), Turns[Job]()
    running: list[Job] = []
    for step in range(400):
        if chance.random() < 0.6:
            one = job((chance.choice("abc"), chance.choice("xy"), step // 3))
            queue.add(one)
            turns.add(one, one.share)
        if len(queue) and chance.random() < 0.5:
            chosen = first(queue)
            (expected,) = turns.next(1, list(queue), running)
            for level in (1, 2, 3):  # equal but for who has been served less, of which the two have different ideas
                mine, theirs = (
                    sum(other.share[:level] == one.share[:level] for other in running) for one in (chosen, expected)
                )
                assert mine == theirs
                if chosen.share[:level] != expected.share[:level]:
                    break
            queue.start(chosen)
            running.append(chosen)
        if running and chance.random() < 0.3:
            gone = running.pop(chance.randrange(len(running)))
            queue.remove(gone)
            turns.remove(gone)
        if len(queue) and chance.random() < 0.1:
            gone = chance.choice(list(queue))
            queue.remove(gone)
            turns.remove(gone)
    for one in [*queue, *running]:
        queue.remove(one)
    assert not queue._root.children
    assert not queue._root.waiting
    assert queue._root.taken == queue._root.size == 0


def test_priorities_hold_within_a_key_alone():
    queue = FairQueue()
    late, urgent, other = job(("a", 1, 1)), job(("a", 2, 2), priority=-5), job(("b", 1, 3), priority=9)
    for one in (late, urgent, other):
        queue.add(one)
    order = []
    while len(queue):
        order.append(first(queue))
        queue.start(order[-1])
    assert order == [urgent, other, late], "the other key has its turn, whatever its priority is"


def test_the_earliest_deadline_of_a_client_is_first():
    queue = FairQueue()
    jobs = [job(("a", 1, number), deadline=deadline) for number, deadline in enumerate((math.inf, 9.0, 5.0))]
    for one in jobs:
        queue.add(one)
    order = []
    while len(queue):
        order.append(first(queue))
        queue.start(order[-1])
    assert order == jobs[::-1]


def test_a_look_at_the_next_texts_changes_nothing():
    queue = FairQueue()
    jobs = [job((key, 1, number)) for key in "abc" for number in range(4)]
    for one in jobs:
        queue.add(one)
    with contextlib.closing(queue.next()) as turns:
        seen = list(turns)
    assert len(seen) == 12
    assert {one.share[0] for one in seen[:3]} == set("abc"), "keys take turns"
    with contextlib.closing(queue.next()) as turns:
        assert list(turns) == seen


def test_prompts_are_known_by_what_they_begin_with():
    assert positions(300) == [64, 80, 96, 112, 128, 160, 192, 224, 256, 300]
    assert positions(63) == []
    affinity, text = Affinity(), bytes(8 * 100)
    affinity.note(marks_of(text), ("blob",), 3)
    assert affinity.known(marks_of(text + b"\1" * 800)) == {3: 96}
    assert affinity.known(marks_of(text, salt="x")) == {}
    assert (affinity.cost_of_state("blob", 3), affinity.cost_of_state("blob", 1) > 0) == (0.0, True)
    affinity.lost(3)
    assert affinity.known(marks_of(text)) == {}
