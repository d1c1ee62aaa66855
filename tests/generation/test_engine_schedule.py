"""The schedule of an engine without a model: what is read ahead, for how long a prompt waits, and who gets a slot."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from mambakit.generation.engine_schedule import Schedule
from mambakit.generation.turns import Turns, texts_ahead


class Text:
    """Of a request that is its own."""

    def __init__(self, share: tuple = (), prompt: object = None, most: int = 100):
        self.request, self.share, self.prompt, self.most = self, share, prompt, most
        self.reading = SimpleNamespace(begun=False)
        self.written: list[int] = []
        self.counted = self.seated_at = 0


class Slots:
    """What an engine does with its schedule, a token of each text a step."""

    def __init__(self, slots: int, slice_tokens: int = 32):
        self.schedule, self.slots, self.slice_tokens = Schedule(slots), slots, slice_tokens
        self.writing: list[Text] = []
        self.left = 0  # texts that have left a slot before their end

    def add(self, *texts: Text) -> None:
        for text in texts:
            self.schedule.add(text)

    def read(self, text: Text) -> None:
        text.reading.begun = True
        text.written.append(0)
        self.schedule.was_read(text)
        self.schedule.started(text)

    def seat(self) -> None:
        if not self.schedule.ready:
            return
        leaving, entering = self.schedule.admission(self.writing, self.slice_tokens)
        self.left += len(leaving)
        for text in leaving:
            self.writing.remove(text)
            self.schedule.ready[text] = None
        for text in entering:
            del self.schedule.ready[text]
            text.seated_at = len(text.written)
            self.writing.append(text)
        assert len(self.writing) <= self.slots

    def write(self) -> list[Text]:
        """The texts that have ended."""
        for text in self.writing:
            text.written.append(0)
        ended = [text for text in self.writing if len(text.written) >= text.most]
        for text in ended:
            self.writing.remove(text)
            self.schedule.remove(text)
        return ended

    def step(self, prompts: int = 1 << 30) -> list[Text]:
        """Read so many prompts, as on a CPU; then write."""
        self.schedule.begin_step()
        for _ in range(prompts):
            due, ahead = self.schedule.may_be_read()
            if not due and not ahead:
                break
            self.read((due or ahead)[0])
        self.seat()
        return self.write()


@pytest.mark.parametrize("slots", [1, 8, 64])
def test_prompts_next_in_turn_are_read_ahead_and_no_others(slots):
    engine = Slots(slots)
    texts = [Text() for _ in range(4 * slots + 9)]
    engine.add(*texts)
    lead = texts_ahead(slots)
    assert lead == max(2, slots // 8)
    engine.schedule.begin_step()
    assert engine.schedule.may_be_read() == (texts[:slots], texts[slots : slots + lead])
    engine.step()
    assert engine.writing == texts[:slots]
    assert list(engine.schedule.ready) == texts[slots : slots + lead]
    engine.step()
    assert len(engine.schedule.ready) == lead, "no more, however long they write"


def test_the_first_of_another_share_is_due():
    """Its first token comes before what is read ahead, however many texts came earlier."""
    engine = Slots(4)
    engine.add(*(Text(("big",)) for _ in range(20)))
    engine.step(4)
    others = [Text(("small", i)) for i in range(3)]
    engine.add(*others)
    engine.schedule.begin_step()
    assert engine.schedule.may_be_read()[0] == others


def test_a_slot_is_refilled_in_the_step_in_which_it_is_found_free():
    """Under steady load, where prompts are read as fast as texts end."""
    chance = random.Random(0)
    engine = Slots(8)
    engine.add(*(Text(most=chance.randrange(5, 40)) for _ in range(20)))
    while len(engine.writing) < 8:
        engine.step()
    idle = 0
    for _ in range(300):
        ended = engine.step(prompts=1)
        engine.add(*(Text(most=chance.randrange(5, 40)) for _ in ended))
        idle += 8 - len(ended) - len(engine.writing)
        assert len(engine.schedule.ready) <= texts_ahead(8)
    assert idle < 10
    assert engine.left == 0


def test_texts_of_one_share_keep_their_slots_and_get_them_in_order():
    engine = Slots(2, slice_tokens=4)
    first, long, *others = texts = [Text() for _ in range(6)]
    engine.add(*texts)
    engine.schedule.begin_step()
    for text in (first, others[0], others[1]):  # the second has a long prompt
        engine.read(text)
    engine.seat()
    assert engine.writing == [first, others[0]]
    for _ in range(10):
        engine.write()
    engine.read(long)
    engine.seat()
    assert engine.writing == [first, others[0]], "though their slices are over, and it came before one of them"
    other = Text(("another",))
    engine.add(other)
    engine.read(other)
    engine.seat()
    assert engine.writing == [first, other], "of one share the latest makes room for another share"
    engine.writing.remove(other)
    engine.schedule.remove(other)
    engine.seat()
    assert engine.writing == [first, long], "the oldest is next"


def test_texts_of_one_share_keep_their_slots_beside_another_share():
    engine = Slots(3, slice_tokens=4)
    first, long, late = mine = [Text(("mine",)) for _ in range(3)]
    other = Text(("another",))
    engine.add(*mine, other)
    engine.schedule.begin_step()
    for text in (first, late, other):
        engine.read(text)
    engine.seat()
    for _ in range(10):
        engine.write()
    engine.read(long)
    engine.seat()
    assert engine.writing == [first, late, other]
    assert engine.left == 0


def test_nothing_is_looked_for_while_all_slots_are_taken_by_the_one_share(monkeypatch):
    engine = Slots(4, slice_tokens=1)
    engine.add(*(Text() for _ in range(20)))
    for _ in range(3):
        engine.step()
    assert engine.schedule.ready
    monkeypatch.delattr(Turns, "next")
    assert engine.schedule.admission(engine.writing, 1) == ([], [])


def test_texts_of_one_prompt_wait_for_the_one_that_reads_it():
    engine = Slots(2)
    texts = [Text(prompt="same") for _ in range(4)]
    engine.add(*texts)
    engine.schedule.begin_step()
    assert engine.schedule.may_be_read() == ([texts[0]], [])
    texts[0].reading.begun = True
    assert engine.schedule.may_be_read() == ([texts[0]], [])
    engine.read(texts[0])
    assert engine.schedule.may_be_read() == ([texts[1]], [])


def test_a_look_at_all_texts_is_taken_once_a_step(monkeypatch):
    """However many prompts are read in it and texts come and end."""
    looks, next_ = [], Turns.next
    monkeypatch.setattr(Turns, "next", lambda self, *a, **k: looks.append(1) or next_(self, *a, **k))
    engine = Slots(100)
    engine.add(*(Text((i % 7,)) for i in range(1000)))
    engine.step(90)
    assert len(looks) == 2, "who has a turn, and the first of each share"
    engine.add(*(Text((i % 7,)) for i in range(9)))
    looks.clear()
    engine.schedule.begin_step()
    for text in engine.schedule.may_be_read()[0][:5]:
        engine.schedule.remove(text)
        assert engine.schedule.may_be_read()
    assert len(looks) == 2
    looks.clear()
    for _ in range(10):
        engine.schedule.begin_step()
        engine.schedule.may_be_read()
    assert len(looks) <= 4, "nothing has changed"


def test_newcomers_start_level_however_many_come_at_once(monkeypatch):
    counts, count = [], Schedule._count_all_written
    monkeypatch.setattr(Schedule, "_count_all_written", lambda self: counts.append(1) or count(self))
    engine = Slots(2)
    old = Text(("old",))
    engine.add(old)
    for _ in range(20):
        engine.step()
    counts.clear()
    new = [Text(("new", i)) for i in range(50)]
    engine.add(*new)
    assert len(counts) == 1
    assert engine.schedule._turns.next(1) == [old], "they have been served as much as it, and it came first"


@pytest.mark.parametrize(
    ("slots", "writing", "due", "steps"),
    [
        (64, 64, 1, 2),  # no slot is idle for want of a prompt
        (64, 64, 9, 2),
        (64, 63, 1, 2),
        (64, 62, 2, 1),
        (64, 60, 4, 0),
        (64, 30, 1, 1),
        (8, 7, 1, 0),  # an eighth of the slots would be idle
        (8, 8, 1, 2),
        (64, 0, 1, 0),
    ],
)
def test_how_long_a_due_prompt_waits_for_others(slots, writing, due, steps):
    engine = Slots(slots)
    engine.add(*(Text(("writers",)) for _ in range(writing)))
    engine.step()
    assert len(engine.writing) == writing
    newcomers = [Text(("new", i)) for i in range(due)]
    engine.add(*newcomers)
    waited = 0
    while True:
        engine.schedule.begin_step()
        assert engine.schedule.may_be_read()[0] == newcomers
        overdue = engine.schedule.overdue()
        assert overdue in (set(), set(newcomers))
        if overdue:
            break
        waited += 1
    assert waited == steps


@pytest.mark.parametrize("seed", range(30))
def test_random_texts_all_end(seed):
    chance = random.Random(seed)
    slots = chance.choice([1, 2, 5, 16])
    engine = Slots(slots, chance.choice([1, 4, 32]))
    shares = [(), ("a",), ("b", 1), ("b", 2)][: chance.randrange(1, 5)]
    texts: list[Text] = []
    while len(texts) < 120 or len(engine.schedule):
        for _ in range(chance.randrange(6) if len(texts) < 120 else 0):
            texts.append(Text(chance.choice(shares), chance.choice([None, None, "p"]), chance.randrange(2, 20)))
            engine.add(texts[-1])
        if texts and chance.random() < 0.1:
            gone = chance.choice(texts)
            if gone in engine.schedule.texts:
                if gone in engine.writing:
                    engine.writing.remove(gone)
                gone.most = len(gone.written)
                engine.schedule.remove(gone)
        engine.step(chance.randrange(5))
        due, ahead = engine.schedule.may_be_read()
        assert len(set(due) | set(ahead)) == len(due) + len(ahead)
        if len(shares) == 1:
            assert len(engine.schedule.ready) <= texts_ahead(slots)
            assert engine.left == 0
    assert not engine.schedule.unread
    assert not engine.schedule.ready
    assert all(len(text.written) == text.most for text in texts)
