"""Extreme temperatures and penalties give their limit, not NaN; ordinary ones have transformers' bits."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
from transformers import LogitsProcessorList, generation

from mambakit.decoding.scaling import WidePenalty, WideTemperature, processors, widened
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.engine import Engine, Request
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Sampling, Stream
from mambakit.ops.sampling.api import NO_TOKEN
from tests.decoding.choose_one import choose_one
from tests.models.configurations import pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = [5e-324, 1e-300, 1e-45, 1e-38, 1e-20, 1e-8]
EXTREME = [*TINY, 1e-5, 0.5, 1, 2, 1e9, 1e30, 1e38, 1e39, 1e300, sys.float_info.max]
CPU = torch.device("cpu")


class Spelling:
    """Each token is a letter."""

    def decode(self, tokens: list[int], **_) -> str:
        return "".join(chr(65 + t) for t in tokens)


@pytest.fixture(scope="module")
def model():
    model = pair("untied")[0]
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return tokens(1, 12)


def greedy(model, ids, count=8) -> list[int]:
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", EXTREME)
@pytest.mark.parametrize("temperature", [0, *EXTREME])
def test_every_temperature_and_penalty_chooses(temperature, penalty):
    """With filters, with logits of any size, and where a constraint has left few tokens."""
    read = torch.tensor([[1, 2, 3, 3, 5]])
    for dtype, scale, masked in itertools.product((torch.float32, torch.float64), (1e-30, 1, 1e4, 1e29), (False, True)):
        logits = (
            torch.linspace(-1, 1, 40, dtype=dtype)[None, torch.randperm(40, generator=torch.Generator().manual_seed(0))]
            * scale
        )
        logits[0, 7] = 0
        if masked:
            logits[0, 3:] = -torch.inf
        for filters in (
            {},
            {"top_k": 2**31, "top_p": 5e-324, "min_p": 1.0},
            {"top_p": 0.9, "min_p": 5e-324},
            {"top_k": 1},
        ):
            token = choose_one(Sampling(temperature, repetition_penalty=penalty, seed=1, **filters), logits, read)
            assert token != NO_TOKEN, (dtype, scale, masked, filters)
            assert not masked or token < 3


@pytest.mark.parametrize("temperature", TINY)
def test_small_temperatures_are_the_limit(temperature):
    """The likeliest token; and a distribution where logits are as close as the temperature."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    assert all(choose_one(Sampling(temperature, seed=s), logits, None) == int(logits.argmax()) for s in range(5))
    close = torch.tensor([[0.0, temperature, -torch.inf, -(10**6) * temperature]], dtype=torch.float64)
    _, by_row = processors(1.0, temperature)
    expected = torch.tensor([[1, torch.e, 0, 0]]) / (1 + torch.e)
    if temperature > 1e-300:
        assert torch.allclose(by_row(None, close).softmax(-1).float(), expected, atol=1e-6)


def test_penalties_are_the_limit():
    """With a tiny penalty the largest positive penalised logit wins; with a huge one a negative logit never does."""
    logits, read = torch.tensor([[1.0, 3.0, 2.0, 5.0, -1.0]]), torch.tensor([[1, 2, 4]])
    for temperature in (0, 1e-300, 1, 2):
        for penalty in (1e-300, 1e-100, 1e-30):
            assert choose_one(Sampling(temperature, repetition_penalty=penalty), logits, read) == 1
        for penalty in (1e30, 1e100, 1e300):
            drawn = {
                choose_one(Sampling(temperature, repetition_penalty=penalty, seed=s), logits, read) for s in range(20)
            }
            assert 4 not in drawn
            assert 3 in drawn


@pytest.mark.parametrize("temperature", [1e-4, 0.3, 1.0, 1.7, 1e30])
@pytest.mark.parametrize("penalty", [1e-8, 0.5, 1.0, 1.2, 1e8])
def test_ordinary_numbers_are_transformers(temperature, penalty):
    by_text, by_row = processors(penalty, temperature)
    given = LogitsProcessorList([*by_text, *by_row])
    assert {type(p) for p in given} <= {generation.TemperatureLogitsWarper, generation.RepetitionPenaltyLogitsProcessor}
    assert widened(given) is given


@pytest.mark.parametrize(
    "extra", [{}, {"output_scores": True, "return_dict_in_generate": True}, {"top_k": 5, "top_p": 1e-300}]
)
@pytest.mark.parametrize("temperature", TINY)
def test_generate(model, ids, temperature, extra):
    """Our loop and transformers'."""
    out = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=temperature, **extra)
    out = out if isinstance(out, torch.Tensor) else out.sequences
    assert out[0, ids.shape[1] :].tolist() == greedy(model, ids)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e39, 1e300])
def test_generate_with_a_penalty(model, ids, penalty, sample):
    both = ids.repeat(2, 1)
    ours = model.generate(both, max_new_tokens=6, do_sample=sample, repetition_penalty=penalty, top_k=1)
    theirs = model.generate(
        both, max_new_tokens=6, do_sample=sample, repetition_penalty=penalty, top_k=1, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(ours, theirs.sequences)
    assert not any(scores.isnan().any() for scores in theirs.scores)
    if penalty > 1:
        written = ours[0, ids.shape[1] :].tolist()
        assert len(set(written)) == len(written), "nothing comes twice"


def test_beams_refuse_what_they_cannot_add_up(model, ids):
    for name, value in (("temperature", 1e-300), ("repetition_penalty", 1e300)):
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(str(value))}.*num_beams=2"):
            model.generate(ids, max_new_tokens=2, num_beams=2, do_sample=True, **{name: value})


@pytest.mark.parametrize("temperature", TINY)
def test_streams_and_the_engine(model, ids, temperature):
    expected, sampling = greedy(model, ids), Sampling(temperature, seed=0)
    request = Request(ids[0], sampling, max_new_tokens=8)
    Engine(model).write([request])
    streams = [
        Stream(model, Spelling(), ids[0], sampling, 8),
        SpeculativeStream(model, Spelling(), ids[0], sampling, 8, drafter=PromptLookup()),
        SpeculativeStream(model, Spelling(), ids[0], sampling, 8, drafter=DraftModel(model)),
    ]
    for stream in streams:
        list(stream)
    assert [request.tokens, *[s.tokens for s in streams]] == [expected] * 4


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 1.5, float("nan"), True, "1"])
def test_a_seed_is_refused_by_name(model, ids, seed):
    with pytest.raises((TypeError, ValueError), match="^seed is "):
        model.generate(ids, max_new_tokens=2, do_sample=True, seed=seed)


def test_broken_logits_still_say_so():
    read = torch.tensor([[1, 2]])
    for broken in (torch.nan, torch.inf):
        logits = torch.zeros(1, 10)
        logits[0, 1] = broken
        for temperature, penalty in itertools.product(EXTREME, (1e-300, 1, 1e300)):
            assert choose_one(Sampling(temperature, repetition_penalty=penalty), logits, read) == NO_TOKEN


def test_a_prompts_padding_is_not_penalised():
    """What transformers says of padding is kept."""
    plain = generation.RepetitionPenaltyLogitsProcessor(1e300, prompt_ignore_length=1)
    penalty, temperature = widened(LogitsProcessorList([plain]))
    assert (type(penalty), type(temperature)) == (WidePenalty, WideTemperature)
    logits = torch.tensor([[2.0, 1.5, 1.0]])
    assert int(temperature(None, penalty(torch.tensor([[0, 1]]), logits)).argmax()) == 0
