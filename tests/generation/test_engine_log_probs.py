"""Log-probabilities of an engine's texts are those of scoring the whole text; and texts with a least length."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.decoding.slots import SlotPool
from mambakit.generation.engine import Engine, Request
from mambakit.generation.logprobs import token_log_probs
from mambakit.generation.stream import SamplingParams
from tests.decoding.eager_graph import WAYS, decode_by
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = (torch.arange(30, dtype=torch.int64) * 7 % 53 + 1).reshape(5, 6)
PARAMS = [
    SamplingParams(0), SamplingParams(seed=1), SamplingParams(0.8, top_p=0.9, seed=2),
    SamplingParams(0, logit_bias={4: 3.0}), SamplingParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.5),
]  # fmt: skip
TOPS = [None, 0, 3, 61, 2]


@pytest.fixture
def model():
    model = pair("untied")[0]
    model.generation_config.eos_token_id = [3, 9]
    return model


def requests(tops=TOPS, **options) -> list[Request]:
    return [
        Request(row, params, max_new_tokens=9 + 3 * i, log_probs=top, **options)
        for i, (row, params, top) in enumerate(zip(PROMPTS, PARAMS, tops, strict=True))
    ]


@pytest.mark.parametrize("per_look", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_of_the_whole_text(model, monkeypatch, way, per_look):
    decode_by(way, monkeypatch)
    plain = Engine(model, 3).write(requests([None] * 5))
    found = Engine(model, 3, tokens_per_look=per_look).write(requests())
    for row, one, other, top in zip(PROMPTS, found, plain, TOPS, strict=True):
        assert one.tokens == other.tokens  # asking changes no text
        if top is None:
            assert one.token_log_probs == []
            continue
        assert [entry.token for entry in one.token_log_probs] == one.tokens
        if not one.tokens:
            continue
        scored = token_log_probs(model, torch.tensor([*row.tolist(), *one.tokens]), top=min(top, 60))
        # A step and a forward of the whole text round differently.
        own = torch.tensor([entry.log_prob for entry in one.token_log_probs])
        torch.testing.assert_close(own, scored.log_probs[len(row) :], atol=2e-4, rtol=1e-4, check_dtype=False)
        for entry, values in zip(one.token_log_probs, scored.top_log_probs[len(row) :].tolist(), strict=True):
            assert len(entry.top) == min(top, 61)
            assert len({token for token, _ in entry.top}) == len(entry.top)
            best = [p for _, p in entry.top]
            assert best == sorted(best, reverse=True)
            assert best[: len(values)] == pytest.approx(values, abs=2e-4)
            assert dict(entry.top).get(entry.token, entry.log_prob) == pytest.approx(entry.log_prob, abs=1e-6)


def test_the_decoder_still_chooses_where_nobody_asks(model, monkeypatch):
    """Recording needs the logits of a step; greedy texts that ask for nothing keep the decoder's own argmax."""
    calls, likeliest = [], SlotPool.likeliest
    monkeypatch.setattr(SlotPool, "likeliest", lambda self, *args: calls.append(1) or likeliest(self, *args))
    Engine(model, 2).write([Request(PROMPTS[0], max_new_tokens=5)])
    assert calls
    calls.clear()
    Engine(model, 2).write([Request(PROMPTS[0], max_new_tokens=5, log_probs=1)])
    assert not calls


@pytest.mark.parametrize("per_look", [1, 4])
@pytest.mark.parametrize("params", PARAMS[:3], ids=str)
def test_no_end_before_the_least_length(model, monkeypatch, params, per_look):
    """Every token may end a text: only the least length keeps it from ending at once."""
    ends = list(range(0, 61, 2))
    model.generation_config.eos_token_id = ends
    lengths = [0, 1, 5, 12]
    made = [
        Request(PROMPTS[i], params, max_new_tokens=12, min_new_tokens=least, log_probs=0 if i % 2 else None)
        for i, least in enumerate(lengths)
    ]
    for one, least in zip(Engine(model, 3, tokens_per_look=per_look).write(made), lengths, strict=True):
        assert len(one.tokens) >= least
        assert not set(one.tokens) & set(ends)
        assert one.finish_reason == ("length" if len(one.tokens) == 12 else "stop")
    assert any(one.finish_reason == "stop" for one in made)


def test_ends_that_are_ignored(model):
    model.generation_config.eos_token_id = list(range(61))
    ends, goes_on = Engine(model, 2).write(
        [Request(PROMPTS[0], max_new_tokens=6), Request(PROMPTS[0], max_new_tokens=6, ignore_ends=True)]
    )
    assert (ends.tokens, ends.finish_reason) == ([], "stop")
    assert (len(goes_on.tokens), goes_on.finish_reason) == (6, "length")
    model.generation_config.eos_token_id = None
    assert goes_on.tokens == Engine(model, 2).write([Request(PROMPTS[0], max_new_tokens=6)])[0].tokens


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("log_probs", -1, "log_probs is -1"), ("min_new_tokens", 300, "at most 256"), ("log_probs", True, "is true")],
)
def test_refusals(name, value, says):
    with pytest.raises((TypeError, ValueError), match=says):
        Request(PROMPTS[0], **{name: value})


@pytest.mark.cuda
@pytest.mark.parametrize("per_look", [None, 1, 8])
def test_on_a_gpu(per_look):
    """Captured decoders, with several tokens per look: the same texts, and the log-probabilities of a forward."""
    torch.manual_seed(0)
    config = mambakit.MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=2)
    model = mambakit.MambaForCausalLM(config).eval().cuda()
    model.generation_config.eos_token_id = None

    def texts(tops: list[int | None]) -> list[Request]:
        made = [
            Request(row, SamplingParams(float(i % 2), seed=i), max_new_tokens=40, log_probs=top)
            for i, (row, top) in enumerate(zip(PROMPTS, tops, strict=True))
        ]
        return Engine(model, 8, tokens_per_look=per_look).write(made)

    for row, one, other in zip(PROMPTS, texts([3, None, 0, 1, 5]), texts([None] * 5), strict=True):
        assert one.tokens == other.tokens
        if one.log_probs is None:
            continue
        scored = token_log_probs(model, torch.tensor([*row.tolist(), *one.tokens]), top=one.log_probs)
        own = torch.tensor([entry.log_prob for entry in one.token_log_probs])
        torch.testing.assert_close(own, scored.log_probs[len(row) :], atol=1e-2, rtol=1e-2, check_dtype=False)
