"""How `generate` chooses a token: transformers' scores, and torch's draws without its waits."""

from __future__ import annotations

import torch

from mambakit.decoding.processor_sampler import ProcessorSampler, multinomial
from tests.models.configurations import tokens


def test_drawing_is_multinomial():
    for shape in ((1, 61), (7, 61), (3, 5000)):
        probabilities = torch.randn(shape).mul(3).softmax(-1)
        for seed in range(20):
            torch.manual_seed(seed)
            expected, following = torch.multinomial(probabilities, 1)[:, 0], torch.rand(2)
            torch.manual_seed(seed)
            token, sane = multinomial(probabilities)
            assert torch.equal(token, expected)
            assert torch.equal(torch.rand(2), following)
            assert sane.all()
    for wrong in (float("nan"), 0.0):
        probabilities = torch.full((3, 61), 1 / 61)
        probabilities[1] = wrong
        assert multinomial(probabilities)[1].tolist() == [True, False, True]


def test_scores_are_float32_whatever_the_model_is():
    """As transformers' loop makes them of a float64 model's logits; and the logits stay as they are."""
    logits = torch.tensor([[0.0, 1.0, 1.0 + 1e-12]], dtype=torch.float64)
    before = logits.clone()
    assert ProcessorSampler([], False, tokens(1, 3)).sample(logits).tolist() == [1], "the first of two that are equal"
    assert torch.equal(logits, before)
