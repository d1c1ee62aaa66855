"""Which guesses stay: tokens have the sampler's distribution whatever the guesses are."""

from __future__ import annotations

import pytest
import torch

from mambakit.decoding.acceptance import Acceptance
from mambakit.decoding.distributions import probabilities
from mambakit.decoding.drafting import Draft
from mambakit.decoding.sampled_text import SampledText
from mambakit.decoding.sampler import Sampler
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.ops.sampling import reference
from mambakit.ops.sampling.api import NO_TOKEN

CPU = torch.device("cpu")
P, Q = torch.tensor([0.5, 0.2, 0.2, 0.08, 0.02]), torch.tensor([0.1, 0.6, 0.0, 0.1, 0.2])


def text_of(params: SamplingParams, v: int = 5) -> SampledText:
    return SampledText(params, v, CPU, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "by_tables"])
@pytest.mark.parametrize("certain", [False, True])
def test_rejection_keeps_the_distribution(certain, biased):
    """Tokens kept or drawn anew follow p, for guesses from q and for certain ones: chi-square at a fixed seed."""
    generator, p = torch.Generator().manual_seed(0), P
    params = SamplingParams(seed=1)
    if biased:
        params = SamplingParams(seed=1, logit_bias={3: 1.5})
        p = (P.log() + 1.5 * (torch.arange(5) == 3)).softmax(-1)
    acceptance, logits, draws = Acceptance(text_of(params), CPU), torch.stack([P.log(), torch.zeros(5)]), 8000
    counts = torch.zeros(5)
    for _ in range(draws):
        guess = 1 if certain else int(torch.multinomial(Q, 1, generator=generator))
        counts[acceptance.choose(logits, Draft([guess], None if certain else Q[None]))[0]] += 1
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 18.5  # 4 degrees of freedom: 0.1 %


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.7),
        SamplingParams(top_k=7),
        SamplingParams(1.3, top_k=20, top_p=0.8, min_p=0.02),
        SamplingParams(top_p=0.5),
        SamplingParams(0.9, top_k=30, typical_p=0.6),
        SamplingParams(epsilon_cutoff=0.02),
    ],
)
def test_the_ops_distribution(params):
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(2)) * 2
    columns = torch.tensor([params.columns[1:]] * 3, dtype=torch.float64)[:, :, None].unbind(1)
    s = (logits.double() - logits.double().amax(1, keepdim=True)) / params.temperature
    w = reference.kept(s, *columns)
    assert torch.allclose(probabilities(params, logits), w / w.sum(1, keepdim=True), atol=1e-7)
    assert (w == 0).any() or params.columns[1:] == SamplingParams().columns[1:]


@pytest.mark.parametrize(
    "params", [SamplingParams(0.8, top_p=0.9, seed=4), SamplingParams(seed=5, frequency_penalty=1)]
)
def test_without_guesses_tokens_are_the_samplers(params):
    """Random number i of a seed is token i's, so that a text is the same whoever chooses its tokens."""
    rows = torch.randn(100, 1, 97, generator=torch.Generator().manual_seed(3))
    acceptance, sampler, text = Acceptance(text_of(params, 97), CPU), Sampler(), text_of(params, 97)
    for logits in rows:
        assert acceptance.choose(logits, Draft([])) == sampler.choose(logits, [text])


@pytest.mark.parametrize("params", [SamplingParams(0), SamplingParams(seed=1), SamplingParams(0, presence_penalty=1)])
def test_logits_that_are_no_numbers(params):
    text = text_of(params)
    logits = torch.stack([torch.full((5,), -9.0), torch.full((5,), torch.nan)])
    logits[0, 2] = 90.0
    assert Acceptance(text, CPU).choose(logits, Draft([2])) == [2, NO_TOKEN]
    assert "no token can be chosen" in text.error
