"""The batched sampler: a text in a slot is the text alone, whatever its neighbours are and wherever its slot lies."""

import random

import numpy as np
import pytest
import torch
from transformers import generation

from mambakit.decoding.sampler import NO_CHOICE, NO_TOKEN, Sampler
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


def alone(params, prompt, tokens):
    sampler = Sampler(V, CPU, 1)
    sampler.put(0, params, torch.tensor(prompt))
    text = list(prompt)
    for _ in range(tokens):
        text += sampler.choose(logits_after(text)[None], [0])
    return text[len(prompt) :]


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
    """Random schedules: texts come, end, move to other slots when the pool grows or shrinks, are taken out and put back."""
    rng = random.Random(seed)
    sampler, slots = Sampler(V, CPU), {}  # slot -> [params, prompt, tokens]
    finished, paused, size = [], [], 0
    for _ in range(60):
        event = rng.random()
        if event < 0.25:
            free = [i for i in range(size) if i not in slots]
            if not free:
                sampler.resize(range(size), size + rng.randint(1, 3))
                free, size = [size], len(sampler)
            slot = rng.choice(free)
            if paused and rng.random() < 0.5:
                slots[slot] = paused.pop()
            else:
                slots[slot] = [rng.choice(PARAMS), [rng.randrange(V) for _ in range(rng.randint(1, 5))], []]
            params, prompt, tokens = slots[slot]
            sampler.put(slot, params, torch.tensor(prompt), tokens)
        elif event < 0.35 and slots:
            slot = rng.choice(list(slots))
            sampler.drop(slot)
            (finished if rng.random() < 0.5 else paused).append(slots.pop(slot))
        elif event < 0.45 and slots:
            kept = rng.sample(list(slots), len(slots))
            slots = {i: slots[slot] for i, slot in enumerate(kept)}
            size = len(kept) + rng.randint(0, 2)
            sampler.resize(kept, size)
        elif slots:
            going = rng.sample(list(slots), rng.randint(1, len(slots)))
            logits = torch.stack([logits_after(slots[i][1] + slots[i][2]) for i in going])
            for i, token in zip(going, sampler.choose(logits, going), strict=True):
                slots[i][2].append(token)
    for params, prompt, tokens in [*finished, *paused, *slots.values()]:
        assert tokens == alone(params, prompt, len(tokens)), params


def test_penalties_are_transformers():
    prompt, logits = torch.tensor([3, 4, 4, 9]), torch.randn(1, V)
    sampler = Sampler(V, CPU, 1)
    sampler.put(0, SamplingParams(temperature=0, repetition_penalty=1.7), prompt)
    text = prompt
    for _ in range(12):
        scores = generation.RepetitionPenaltyLogitsProcessor(1.7)(text[None], logits)
        (token,) = sampler.choose(logits, [0])
        assert token == int(scores.argmax())
        text = torch.cat([text, torch.tensor([token])])


def test_presence_and_frequency_count_what_was_written():
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 4] = 5.0, 4.0
    for params, expected in (
        (SamplingParams(temperature=0, presence_penalty=1.5), [3, 4, 3, 3, 3]),
        (SamplingParams(temperature=0, frequency_penalty=0.75), [3, 3, 4, 3, 4]),
    ):
        sampler = Sampler(V, CPU, 2)
        sampler.put(1, params, torch.tensor([3, 3, 3]))  # the prompt does not count
        assert [sampler.choose(logits, [1])[0] for _ in range(5)] == expected


def test_a_slot_forgets_its_last_text():
    """Penalties, biases and counts of a text are gone with it, also where the next one has none or others."""
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    best = int(logits.argmax())
    sampler = Sampler(V, CPU, 2)
    heavy = SamplingParams(temperature=0, repetition_penalty=9, presence_penalty=9, logit_bias={best: -50.0})
    sampler.put(0, heavy, torch.arange(V))
    assert sampler.choose(logits, [0]) != [best]
    sampler.put(0, SamplingParams(temperature=0), torch.tensor([best]))
    assert sampler.choose(logits, [0]) == [best]
    sampler.put(0, SamplingParams(temperature=0, repetition_penalty=1.01), torch.tensor([1]))
    assert sampler.choose(logits, [0]) == [best]
    sampler.put(0, SamplingParams(temperature=0, frequency_penalty=0.01), torch.tensor([best]))
    assert sampler.choose(logits, [0]) == [best]


def test_who_cannot_choose_does_so_alone():
    logits = torch.randn(4, V)
    logits[1, 5] = torch.nan
    logits[3, 0] = torch.inf
    sampler = Sampler(V, CPU, 4)
    for slot in range(4):
        sampler.put(slot, SamplingParams(seed=slot), torch.tensor([1]))
    tokens = sampler.choose(logits, range(4))
    assert [t == NO_TOKEN for t in tokens] == [False, True, False, True]
    assert sampler.error(1) == NO_CHOICE


def test_a_constraint_that_fails_ends_its_own_text():
    class Full(EvenParams):
        def matcher(self):
            return Even(most=2)

    sampler = Sampler(V, CPU, 3)
    for slot, params in enumerate((EvenParams(seed=1), Full(seed=2), EvenParams(seed=3))):
        sampler.put(slot, params, torch.tensor([1]))
    logits = torch.randn(3, V)
    rounds = [sampler.choose(logits, range(3)) for _ in range(3)]
    assert [[t == NO_TOKEN for t in tokens] for tokens in rounds] == [[False] * 3, [False] * 3, [False, True, False]]
    assert sampler.error(1) == "the sentence is full"
    assert all(t % 2 == 0 for tokens in rounds for t in tokens if t != NO_TOKEN)


def test_plain():
    sampler = Sampler(V, CPU, 3)
    sampler.put(0, SamplingParams(temperature=0, top_k=4), torch.tensor([1]))
    sampler.put(1, SamplingParams(temperature=0, repetition_penalty=2), torch.tensor([1]))
    assert sampler.plain([0, 2])
    assert not sampler.plain([0, 1])
    sampler.drop(1)
    assert sampler.plain([0, 1])


def test_tokens_chosen_elsewhere_count():
    """A greedy text that starts to draw does so from the number of its own position."""
    sampler, other = Sampler(V, CPU, 1), Sampler(V, CPU, 1)
    for s in (sampler, other):
        s.put(0, SamplingParams(seed=1), torch.tensor([1]))
    logits = torch.randn(70, 1, V)
    for row in logits[:66]:
        sampler.choose(row, [0])
        other.take([0])
    assert [sampler.choose(row, [0]) for row in logits[66:]] == [other.choose(row, [0]) for row in logits[66:]]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"typical_p": 0}, "typical_p is 0, which keeps no token"),
        ({"epsilon_cutoff": 2}, "epsilon_cutoff is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_values(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)
