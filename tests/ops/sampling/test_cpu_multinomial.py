"""Draws from the CPU's global generator: the tokens and the generator of `torch.multinomial`."""

from __future__ import annotations

import pytest
import torch

from mambakit.ops.sampling.cpu_multinomial import multinomial, serves


@pytest.fixture(autouse=True)
def generator():
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 624), (2, 1000), (16, 1025), (5, 50280)])
@pytest.mark.parametrize("drawn", [0, 1, 623])
def test_tokens_and_random_numbers_are_torchs(isa, shape, drawn):
    torch.manual_seed(shape[1] + drawn)
    probabilities = (3 * torch.randn(*shape)).softmax(-1)
    for seed in range(4):
        torch.manual_seed(seed)
        torch.rand(drawn)  # so that pairs of words lie across the ends of the generator's state
        state = torch.get_rng_state()
        want = [torch.multinomial(probabilities, 1)[:, 0] for _ in range(3)]
        after = torch.get_rng_state(), torch.rand(5), torch.randn(5)
        torch.set_rng_state(state)
        got = [multinomial(probabilities) for _ in range(3)]
        assert all(torch.equal(tokens, each) for (tokens, _), each in zip(got, want, strict=True))
        assert all(drawable.all() for _, drawable in got)
        assert torch.equal(torch.rand(5), after[1])
        assert torch.equal(torch.randn(5), after[2])


def test_as_often_as_they_are_probable(isa):
    """As `torch.multinomial` where many are equal, or 0, or tiny."""
    probabilities = torch.zeros(64, 3000)
    probabilities[:, ::7] = 1 / 429
    probabilities[:, 5] = 1e-30
    torch.manual_seed(1)
    want = torch.cat([torch.multinomial(probabilities, 1)[:, 0] for _ in range(20)])
    torch.manual_seed(1)
    assert torch.equal(torch.cat([multinomial(probabilities)[0] for _ in range(20)]), want)


def test_rows_that_cannot_be_drawn_from(isa):
    probabilities = torch.rand(4, 100)
    probabilities[1] = 0
    probabilities[2, 40] = float("nan")
    tokens, drawable = multinomial(probabilities)
    assert drawable.tolist() == [True, False, False, True]
    assert ((tokens >= 0) & (tokens < 100)).all()


def test_what_it_serves(isa):
    assert serves(torch.rand(2, 3))
    assert not serves(torch.rand(2, 3).double())
    assert not serves(torch.rand(3, 2).T)
    assert not serves(torch.rand(2, 3, device="meta"))
