"""An engine with a drafter: greedy texts and states are those of plain decoding, samples have its distribution."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import mambakit
from mambakit.decoding import slots
from mambakit.generation.drafters import Draft, DraftModel, PromptLookup
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from tests.decoding.eager_graph import speculate_on_device
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY = Sampling(temperature=0)


def model_of(name="plain", **changed):
    model = pair(name)[0].eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3}
    return model_of(), mambakit.MambaForCausalLM(mambakit.MambaConfig(**shape)).eval()


class Truth:
    """A drafter that knows the texts, by their prompts, and is wrong at every third place."""

    def __init__(self, texts):
        self.texts = texts

    def begin(self, ids, sampling, scores, generator):
        self.text, self.start = self.texts[tuple(ids.tolist())], len(ids)

    def propose(self, text, most):
        at = len(text) - self.start
        return Draft([token ^ (i % 3 == 2) for i, token in enumerate(self.text[at : at + most], at)])


def requests_of(lengths, **options):
    generator = torch.Generator().manual_seed(3)
    return [
        Request(torch.randint(0, 61, (5 + i,), generator=generator), max_new_tokens=n, keep_state=True, **options)
        for i, n in enumerate(lengths)
    ]


def drafter_of(kind, models, plain):
    model, other = models
    texts = {tuple(r.prompt_ids.tolist()): r.tokens for r in plain}
    return {"right": lambda: Truth(texts), "lookup": lambda: PromptLookup(3, 1), "same": lambda: DraftModel(model),
            "other": lambda: DraftModel(other)}[kind]()  # fmt: skip


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("kind", ["right", "lookup", "same", "other"])
def test_greedy_texts_and_states_are_plain_decodings(models, kind, draft_tokens, slots):
    lengths = [9, 1, 24, 17, 30, 2, 12, 12, 5, 21]
    plain = Engine(models[0], slots).write(requests_of(lengths))
    engine = Engine(models[0], slots, drafter=drafter_of(kind, models, plain), draft_tokens=draft_tokens)
    drafted = engine.write(requests_of(lengths))
    for mine, expected in zip(drafted, plain, strict=True):
        assert mine.tokens == expected.tokens
        assert mine.finish_reason == "length"
        assert torch.equal(mine.final_state.ssm_states, expected.final_state.ssm_states)
        assert torch.equal(mine.final_state.conv_states, expected.final_state.conv_states)
        assert mine.final_state.get_seq_length() == expected.final_state.get_seq_length()
    assert engine.drafts.proposed > 0
    if kind == "same":
        assert engine.drafts.accepted > 0.9 * engine.drafts.proposed
    if kind in ("right", "same") and draft_tokens == 4:
        assert engine.drafts.accepted > 0.4 * sum(lengths)


@pytest.mark.parametrize("name", ["falcon", "gelu", "odd_everything"])
def test_other_models(name):
    model = model_of(name)
    plain = Engine(model, 3).write(requests_of([12, 7, 15, 9]))
    for drafter in (DraftModel(model), PromptLookup(2, 1)):
        drafted = Engine(model, 3, drafter=drafter).write(requests_of([12, 7, 15, 9]))
        assert [r.tokens for r in drafted] == [r.tokens for r in plain]


def test_ends_penalties_and_requests_without_drafts(models):
    model = copy.deepcopy(models[0])
    first = Engine(model, 4).write(requests_of([30] * 6))
    model.generation_config.eos_token_id = first[0].tokens[7]
    how = [
        {"log_probs": 2},
        {"sampling": Sampling(0, repetition_penalty=1.3, presence_penalty=0.5)},
        {"sampling": Sampling(0, logit_bias={5: 2.0}), "log_probs": 0},
        {"draft_tokens": 0},
        {"draft_tokens": 1, "min_new_tokens": 20},
        {"ignore_ends": True},
    ]

    def make():
        return [requests_of([30] * 6, **one)[i] for i, one in enumerate(how)]

    plain = Engine(model, 4).write(make())
    assert "stop" in {r.finish_reason for r in plain}
    for drafter in (DraftModel(model), DraftModel(models[1]), PromptLookup(2, 1)):
        drafted = Engine(model, 4, drafter=drafter).write(make())
        for mine, expected in zip(drafted, plain, strict=True):
            assert (mine.tokens, mine.finish_reason) == (expected.tokens, expected.finish_reason)
            assert torch.equal(mine.final_state.ssm_states, expected.final_state.ssm_states)
            assert len(mine.token_log_probs) == len(expected.token_log_probs)
            for one, other in zip(mine.token_log_probs, expected.token_log_probs, strict=True):
                assert (one.token, len(one.top)) == (other.token, len(other.top))
                assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)


def test_shares_take_turns_and_prefixes_are_cached(models):
    """Texts leave their slots and come back, and states go to the prefix cache: tokens stay the same."""
    model = models[0]

    def make():
        return [requests_of([40, 40, 9, 9, 9], share=(i % 3,))[i] for i in range(5)]

    plain = Engine(model, 2, slice_tokens=4).write(make())
    cache = PrefixCache(model)
    engine = Engine(model, 2, slice_tokens=4, drafter=DraftModel(models[1]), prefix_cache=cache)
    assert [r.tokens for r in engine.write(make())] == [r.tokens for r in plain]
    again = Request(torch.tensor([*plain[0].prompt_ids.tolist(), *plain[0].tokens]), max_new_tokens=3)
    alone = Request(again.prompt_ids, max_new_tokens=3)
    Engine(model, 2).write([alone])
    engine.write([again])
    assert again.tokens == alone.tokens
    assert again.cached_tokens > 0


def test_cancelled_meanwhile(models):
    engine = Engine(models[0], 2, drafter=DraftModel(models[1]))
    requests = [engine.submit(r) for r in requests_of([60, 60, 6])]
    for i in itertools.count():
        engine.step()
        if i == 4:
            requests[0].cancel()
        if all(r.finish_reason for r in requests):
            break
    assert [r.finish_reason for r in requests] == ["cancelled", "length", "length"]
    plain = Engine(models[0], 2).write(requests_of([60, 60, 6]))
    assert requests[1].tokens == plain[1].tokens
    assert requests[2].tokens == plain[2].tokens


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_samples_have_the_models_distribution(kind):
    """Three tokens of each of many texts, written 8 at a time, against their exact probabilities, by chi-square."""
    torch.manual_seed(3)
    config = mambakit.MambaConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, initializer_range=0.8, eos_token_id=None
    )
    model, other = (mambakit.MambaForCausalLM(config).eval() for _ in range(2))
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([1, 2, 1, 3, 1])
    exact = {}
    with torch.no_grad():
        first = model(prompt[None]).logits[0, -1].softmax(-1)
        for a, b in itertools.product(range(5), repeat=2):
            logits = model(torch.tensor([[*prompt.tolist(), a, b]])).logits[0].softmax(-1)
            for c in range(5):
                exact[a, b, c] = float(first[a] * logits[-2][b] * logits[-1][c])
    drafter = PromptLookup(1, 1) if kind == "lookup" else DraftModel(other)
    engine = Engine(model, 8, drafter=drafter, draft_tokens=2)
    draws = 1500
    requests = engine.write([Request(prompt, Sampling(seed=seed), max_new_tokens=3) for seed in range(draws)])
    counts = dict.fromkeys(exact, 0)
    for request in requests:
        counts[tuple(request.tokens)] += 1
    assert 0.1 < engine.drafts.accepted / engine.drafts.proposed < 0.9, "or one of the two branches is not tested"
    rare = [key for key, p in exact.items() if p * draws < 5]
    cells = [(counts[k], exact[k] * draws) for k in exact if k not in rare]
    cells.append((sum(counts[k] for k in rare), sum(exact[k] for k in rare) * draws))
    statistic = sum((count - expected) ** 2 / max(expected, 1e-9) for count, expected in cells)
    degrees = len(cells) - 1
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5  # about 0.1 %


def test_different_parameters_together(models):
    """A sampled text with prompt lookup has its own random numbers: the same tokens whatever else is written."""
    how = [GREEDY, Sampling(0.8, seed=1), Sampling(seed=2, top_k=5), Sampling(seed=3, presence_penalty=0.4)]

    def make():
        return [requests_of([20] * 4, sampling=one)[i] for i, one in enumerate(how)]

    for drafter in (PromptLookup(2, 1), DraftModel(models[1])):
        alone = [Engine(models[0], 1, drafter=drafter, draft_tokens=3).write([r])[0].tokens for r in make()]
        together = [r.tokens for r in Engine(models[0], 4, drafter=drafter, draft_tokens=3).write(make())]
        assert together[0] == alone[0]
        if isinstance(drafter, PromptLookup):
            assert together == alone


class Broken:
    def begin(self, ids, sampling, scores, generator):
        pass

    def propose(self, text, most):
        raise OSError("no guesses today")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["right", "same"])
def test_verifiers_are_made_before_texts_need_them(models, kind, monkeypatch):
    """Compiled and captured while texts are written, each would hold them up."""
    speculate_on_device(monkeypatch)
    made = []
    real = slots.verifier
    monkeypatch.setattr(slots, "verifier", lambda model, states, most: made.append(most) or real(model, states, most))
    plain = Engine(models[0], 2).write(requests_of([9, 24]))
    engine = Engine(models[0], 2, drafter=drafter_of(kind, models, plain), draft_tokens=4)
    engine.write(requests_of([2]))
    engine.drafts.prepare()
    assert sorted(set(made)) == [2, 3, 4, 5]
    before = len(made)
    found = engine.write(requests_of([9, 24]))
    assert [r.tokens for r in found] == [r.tokens for r in plain]
    assert engine.drafts.accepted
    assert len(made) == before


def test_mistakes(models):
    model = models[0]
    stranger = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="draft_tokens is 16; it must be between 1 and 15"):
        Engine(model, drafter=PromptLookup(), draft_tokens=16)
    with pytest.raises(TypeError, match="drafter is a str; give a DraftModel"):
        Engine(model, drafter="small")
    with pytest.raises(ValueError, match="vocabulary of 7 tokens and the model one of 61"):
        Engine(model, drafter=DraftModel(stranger))
    with pytest.raises(ValueError, match="draft_tokens is -1"):
        Request(torch.tensor([1]), draft_tokens=-1)
    plain = Engine(model, 2).write(requests_of([9, 9]))
    with pytest.warns(UserWarning, match="without drafts from now on: no guesses today"):
        drafted = Engine(model, 2, drafter=Broken()).write(requests_of([9, 9]))
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
