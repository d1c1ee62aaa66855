"""The number of guesses of a text's drafts: it follows the acceptance, and depends on the text alone."""

from __future__ import annotations

import random

import pytest

import mambakit
from mambakit.decoding.guess_count import NO_GUESSES, GuessCount, best_guesses, step_cost

COST = {"verification": 1.10, "token": 0.07}  # of a plain step, as the module has them


def run(acceptance: float, most: int, step: float, rounds: int = 3000) -> tuple[float, float]:
    """(tokens for their cost, guesses a round) of a text whose guesses are right with this probability."""
    count, chance, late = GuessCount(most, step), random.Random(0), 0
    tokens = cost = guesses = 0.0
    for _ in range(rounds):
        asked = count.next()
        made = max(0, min(asked.most, asked.steps - late))
        accepted = 0
        while accepted < made and chance.random() < acceptance:
            accepted += 1
        late = int(late + 1 + accepted > asked.steps)
        count.note(made, accepted)
        tokens, guesses = tokens + accepted + 1, guesses + asked.most
        cost += COST["verification"] + COST["token"] * asked.most + step * asked.steps if asked.most else 1
    return tokens / cost, guesses / rounds


@pytest.mark.parametrize("step", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("most", [1, 4, 15])
def test_speculation_is_never_much_slower_than_plain_decoding(most, step):
    speeds, guesses = zip(*(run(a, most, step) for a in (0, 0.3, 0.5, 0.7, 0.9, 1)), strict=True)
    assert min(speeds) > 0.95
    assert sorted(guesses) == list(guesses), "more guesses where more are right"
    assert guesses[0] < 0.2
    assert guesses[-1] > 0.95 * most
    fixed = (1 - 0.9 ** (most + 1)) / 0.1 / (COST["verification"] + COST["token"] * most + step * (most + 1))
    assert speeds[4] > 0.85 * fixed, "it begins with fewer guesses, and tries plain steps after bad luck"


def test_the_result_of_the_last_round_does_not_count_yet():
    """Rounds are launched ahead: those whose results are known earlier have the same guesses."""
    early, late, chance = GuessCount(5, 0.2), GuessCount(5, 0.2), random.Random(1)
    waiting: list[tuple[int, int]] = []
    for _ in range(500):
        asked = early.next()
        assert late.next() == asked
        result = asked.most, sum(chance.random() < 0.4 for _ in range(asked.most))
        early.note(*result)
        if waiting:
            late.note(*waiting.pop())
        waiting.append(result)


def test_bounds():
    assert GuessCount(0, 0.2).next() == NO_GUESSES
    assert best_guesses(4, 0.2, 0) == NO_GUESSES
    assert best_guesses(4, 0.0, 100).most == 4
    for level in range(101):
        for most in range(16):
            found = best_guesses(most, 0.1, level)
            assert 0 <= found.most <= most
            assert found.steps in (max(2, found.most), found.most + 1)


def test_a_steps_cost():
    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4}
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**shape))
    small = mambakit.MambaForCausalLM(mambakit.MambaConfig(**shape | {"num_hidden_layers": 1}))
    assert step_cost(model, model) == 0.25
    assert 0.0625 < step_cost(model, small) < 0.25
