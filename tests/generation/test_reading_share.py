"""How long an engine reads prompts between two steps."""

from __future__ import annotations

import pytest

from mambakit.generation.reading import Part, ReadingShare


class Prompt:
    """Of one token, or of several parts without progress as the layers of a chunk are."""

    def __init__(self, layers: int = 1):
        self.left, self.layers = 1, layers


class Prompts:
    """Prompts by their age; a part takes 10 ms."""

    def __init__(self, count: int, layers: int = 1):
        self.now, self.looks, self.parts = 0.0, 0, 0
        self.left = [Prompt(layers) for _ in range(count)]

    def candidates(self) -> list[Prompt]:
        self.looks += 1
        return self.left

    def part(self, one: Prompt) -> Part:
        self.now, self.parts = self.now + 0.01, self.parts + 1
        one.layers -= 1
        if one.layers:
            return Part(0, 1)
        self.left.remove(one)
        return Part(1, 1)

    def step(self, share: ReadingShare) -> int:
        before = self.parts
        share.step(self.candidates, lambda one: one, self.part)
        return self.parts - before


@pytest.mark.parametrize(
    ("seconds", "step", "parts"), [(0.035, 0, 3), (0.035, 0.2005, 20), (0.035, 0.01, 3), (0, 9, 1)]
)
def test_as_long_as_a_step_takes(seconds, step, parts):
    """A step of many slots frees more slots than prompts of 20 ms would fill."""
    prompts = Prompts(100)
    share = ReadingShare(seconds, 1 << 20, lambda: prompts.now)
    share.step_seconds = step
    assert prompts.step(share) == parts
    assert prompts.step(share) == parts


def test_no_longer_than_some_steps():
    """Texts that decode wait for two steps' time at most; where none decodes, nobody waits."""
    prompts = Prompts(100)
    share = ReadingShare(0.205, 1 << 20, lambda: prompts.now, steps=2)
    share.step_seconds = 0.0105
    assert prompts.step(share) == 2
    share.step_seconds = 0.0
    assert prompts.step(share) == 20


def test_all_layers_of_a_chunk_are_of_one_prompt_and_one_look():
    prompts = Prompts(9, layers=8)
    share = ReadingShare(0.165, 1 << 20, lambda: prompts.now)
    assert prompts.step(share) == 16
    assert prompts.looks == 3, "one for each of two prompts, and one for what would be next"
    assert [one.layers for one in prompts.left] == [8] * 7


def test_prompts_that_need_no_reading_do_not_spoil_the_rate():
    """The time of those that are known says nothing about how long the next is read."""
    prompts = Prompts(3)
    share = ReadingShare(0.025, 1 << 20, lambda: prompts.now)
    assert prompts.step(share) == 2
    for _ in range(100):
        prompts.left = [Prompt()]
        share.step(prompts.candidates, lambda one: one, lambda one: prompts.part(one) and Part(0, 0))
    prompts.left = [Prompt() for _ in range(3)]
    assert prompts.step(share) == 2
