"""The batched sampler: a text is the text alone, whatever its neighbours are."""

import random

import numpy as np
import pytest
import torch
from transformers import generation

from mambakit.decoding.sampler import NO_CHOICE, NO_TOKEN, SampledText, Sampler
from mambakit.decoding.sampling_params import SamplingParams, random_numbers

V = 97
CPU = torch.device("cpu")


class Even:
    """A constraint for tests: even tokens alone, at most ``most`` of them."""

    def __init__(self, most=10**9):
        self.tokens, self.most = [], most

    @staticmethod
    def mask(logits, matchers):
        if any(len(m.tokens) >= m.most for m in matchers):
            raise ValueError("the sentence is full")
        return logits.masked_fill(torch.arange(logits.shape[1]) % 2 == 1, -torch.inf)

    def accept(self, token):
        if token % 2:
            raise ValueError(f"token {token} is odd")
        self.tokens.append(token)


class EvenParams(SamplingParams):
    def matcher(self):
        return Even()

    mask = staticmethod(Even.mask)


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=3),
    SamplingParams(0.8, top_k=20, top_p=0.9, seed=4),
    SamplingParams(0.9, min_p=0.01, repetition_penalty=1.4, seed=5),
    SamplingParams(1.2, typical_p=0.9, epsilon_cutoff=1e-3, seed=-6),
    SamplingParams(presence_penalty=1.5, frequency_penalty=0.5, seed=2**63),
    SamplingParams(temperature=0, frequency_penalty=2.0),
    SamplingParams(logit_bias={5: 8.0, 7: -100.0}, seed=7),
    SamplingParams(temperature=0, logit_bias={11: 100.0}, repetition_penalty=5.0),
    EvenParams(seed=8, repetition_penalty=1.1),
    EvenParams(temperature=0),
]


def logits_after(text):
    """(v,) what a model might say after these tokens: they depend on all of them."""
    seed = hash(tuple(text)) % 2**31
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


def text_of(params, prompt):
    return SampledText(params, V, CPU, torch.as_tensor(prompt))


def alone(params, prompt, tokens):
    sampler, text, written = Sampler(), text_of(params, prompt), []
    for _ in range(tokens):
        written += sampler.choose(logits_after(prompt + written)[None], [text])
    return written


def test_numbers_of_a_seed():
    first = random_numbers(11, 0)
    assert first.shape == (64,)
    assert (random_numbers(11 + 2**64, 0) == first).all(), "64 bits of a seed count"
    assert not (random_numbers(12, 0) == first).any()
    assert not (random_numbers(11, 1) == first).any()
    assert SamplingParams().key() != SamplingParams().key()
    # Of every release: a seed's text is to stay what it was.
    assert first[:3].tolist() == pytest.approx([0.1270175327, 0.6846286135, 0.6379812716], abs=1e-9)


def test_numbers_are_uniform():
    sample = np.concatenate([random_numbers(5, block) for block in range(300)])
    assert 0 <= sample.min() < 0.001
    assert 0.999 < sample.max() < 1
    assert abs(sample.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("seed", range(20))
def test_a_text_is_the_text_alone(seed):
    """Random schedules: whoever is chosen for together, in whichever order."""
    rng = random.Random(seed)
    sampler, texts = Sampler(), []  # [sampled, params, prompt, tokens]
    for _ in range(60):
        if rng.random() < 0.3 or not texts:
            params, prompt = rng.choice(PARAMS), [rng.randrange(V) for _ in range(rng.randint(1, 5))]
            texts.append([text_of(params, prompt), params, prompt, []])
        going = rng.sample(texts, rng.randint(1, len(texts)))
        for _ in range(rng.randint(1, 4)):
            logits = torch.stack([logits_after(prompt + tokens) for _, _, prompt, tokens in going])
            for text, token in zip(going, sampler.choose(logits, [text[0] for text in going]), strict=True):
                text[3].append(token)
    for _, params, prompt, tokens in texts:
        assert tokens == alone(params, prompt, len(tokens)), params


def test_beyond_a_block_of_random_numbers():
    tokens = alone(PARAMS[1], [1], 150)
    assert len(set(tokens)) > 20
    sampler, text = Sampler(), text_of(PARAMS[1], [1])
    for i, token in enumerate(tokens):
        assert sampler.choose(logits_after([1, *tokens[:i]])[None], [text]) == [token]
        if i % 40 == 0:  # another batch in between
            sampler.choose(torch.randn(1, V), [text_of(PARAMS[2], [1])])


def test_penalties_are_transformers():
    prompt, logits = torch.tensor([3, 4, 4, 9]), torch.randn(1, V)
    sampler, sampled = Sampler(), text_of(SamplingParams(temperature=0, repetition_penalty=1.7), prompt)
    text = prompt
    for _ in range(12):
        scores = generation.RepetitionPenaltyLogitsProcessor(1.7)(text[None], logits)
        (token,) = sampler.choose(logits, [sampled])
        assert token == int(scores.argmax())
        text = torch.cat([text, torch.tensor([token])])


def test_presence_and_frequency_count_what_was_written():
    logits = torch.zeros(2, V)
    logits[:, 3], logits[:, 4] = 5.0, 4.0
    for params, expected in (
        (SamplingParams(temperature=0, presence_penalty=1.5), [3, 4, 3, 3, 3]),
        (SamplingParams(temperature=0, frequency_penalty=0.75), [3, 3, 4, 3, 4]),
    ):
        sampler = Sampler()
        pair = [text_of(SamplingParams(temperature=0, repetition_penalty=1.0001), [1]), text_of(params, [3, 3, 3])]
        # The prompt does not count, nor does the neighbour, whose tables stand beside.
        assert [sampler.choose(logits, pair)[1] for _ in range(5)] == expected


def test_who_cannot_choose_does_so_alone():
    logits = torch.randn(4, V)
    logits[1, 5] = torch.nan
    logits[3, 0] = torch.inf
    texts = [text_of(SamplingParams(seed=i, repetition_penalty=1 + i % 2), [1]) for i in range(4)]
    tokens = Sampler().choose(logits, texts)
    assert [t == NO_TOKEN for t in tokens] == [False, True, False, True]
    assert [text.error for text in texts] == ["", NO_CHOICE, "", NO_CHOICE]


def test_a_constraint_that_fails_ends_its_own_text():
    class Full(EvenParams):
        def matcher(self):
            return Even(most=2)

    sampler, logits = Sampler(), torch.randn(3, V)
    texts = [text_of(params, [1]) for params in (EvenParams(seed=1), Full(seed=2), EvenParams(seed=3))]
    rounds = [sampler.choose(logits, texts) for _ in range(3)]
    assert [[t == NO_TOKEN for t in tokens] for tokens in rounds] == [[False] * 3, [False] * 3, [False, True, False]]
    assert texts[1].error == "ValueError: the sentence is full"
    assert all(t % 2 == 0 for tokens in rounds for t in tokens if t != NO_TOKEN)


def test_logits_stay_and_plain_ones_are_not_copied():
    logits = torch.randn(3, V)
    before = logits.clone()
    Sampler().choose(logits, [text_of(params, [1]) for params in PARAMS[7:10]])
    assert torch.equal(logits, before)
    assert [text_of(params, [1]).plain for params in PARAMS[:2]] == [True, False]
    assert text_of(SamplingParams(temperature=0, top_k=4), [1]).plain
    assert not text_of(SamplingParams(temperature=0, repetition_penalty=2), [1]).plain


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is NaN"),
        ({"typical_p": 0}, "typical_p is 0.*above 0"),
        ({"epsilon_cutoff": 2}, "epsilon_cutoff is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_values(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_bias_of_a_token_that_is_not_there():
    with pytest.raises(ValueError, match=f"logit_bias names token {V}; the model's are 0 to {V - 1}"):
        text_of(SamplingParams(logit_bias={V: 1.0}), [1])
