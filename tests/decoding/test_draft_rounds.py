"""Rounds of speculation on the device, on a CPU: texts and states are plain decoding's, sampled tokens the host's."""

from __future__ import annotations

import copy

import pytest
import torch

import mambakit
from mambakit.decoding import draft_rounds, round_graphs, speculation
from mambakit.decoding.draft_model import DraftModel
from mambakit.generation.engine import Engine, Request
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Sampling, Stream
from tests.decoding.eager_graph import speculate_on_device

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 61


def model_of(seed: int, layers: int = 2, width: int = 16):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "initializer_range": 0.3}
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**shape)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def models():
    """A model, one whose guesses are sometimes right, and one whose guesses are always wrong."""
    model, near, wrong = model_of(0), model_of(0), model_of(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        wrong.backbone.norm_f.weight.neg_()
    return model, near, wrong


@pytest.fixture
def rounds(monkeypatch):
    """Rounds run on the device; the number of those launched."""
    speculate_on_device(monkeypatch)
    found, launch = [], draft_rounds.DraftRounds.launch

    def counted(self, texts, guesses, start):
        found.append(guesses)
        return launch(self, texts, guesses, start)

    monkeypatch.setattr(draft_rounds.DraftRounds, "launch", counted)
    return found


def requests_of(lengths, **options):
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            torch.randint(0, VOCABULARY, (5 + i,), generator=generator), max_new_tokens=n, keep_state=True, **options
        )
        for i, n in enumerate(lengths)
    ]


LENGTHS = [9, 1, 24, 17, 70, 2, 12, 12, 5, 21]


def check_states(model, requests):
    """Final states are those after the texts."""
    for request in requests:
        read = [*request.prompt_ids.tolist(), *request.tokens]
        read = read if request.finish_reason == "stop" else read[:-1]
        expected = model(torch.tensor([read]), use_cache=True).cache_params
        assert request.final_state.get_seq_length() == len(read)
        torch.testing.assert_close(request.final_state.ssm_states, expected.ssm_states, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(request.final_state.conv_states, expected.conv_states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("draft_tokens", [1, 2, 4, 15])
@pytest.mark.parametrize("kind", ["same", "near", "wrong"])
@torch.no_grad()
def test_greedy_texts_and_states_are_plain_decodings(models, rounds, kind, draft_tokens, slots):
    model = models[0]
    draft = dict(zip(("same", "near", "wrong"), models, strict=True))[kind]
    plain = Engine(model, slots).write(requests_of(LENGTHS))
    engine = Engine(model, slots, drafter=DraftModel(draft), draft_tokens=draft_tokens)
    drafted = engine.write(requests_of(LENGTHS))
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
    check_states(model, drafted)
    assert len(rounds) >= engine.drafts.rounds > 0
    assert any(one.most for guesses in rounds for one in guesses.values())
    if kind == "same":
        assert engine.drafts.accepted > 0.9 * engine.drafts.proposed
        assert engine.drafts.rounds < 0.8 * sum(LENGTHS)
    if kind == "wrong":
        assert engine.drafts.accepted == 0
        drafted = sum(bool(one.most) for guesses in rounds for one in guesses.values())
        assert drafted < 0.5 * sum(LENGTHS), "it falls back to plain steps"


HOW = [
    Sampling(0), Sampling(seed=1), Sampling(0.8, seed=2, top_k=5), Sampling(seed=3, top_p=0.9), Sampling(1.3, seed=4),
    Sampling(0.9, seed=5, min_p=0.02), Sampling(seed=6, typical_p=0.8), Sampling(seed=7, epsilon_cutoff=0.01),
]  # fmt: skip


def sampled(how, lengths=(40, 80, 33, 9, 21, 66, 12, 30)):
    return [requests_of(lengths, sampling=how[i % len(how)])[i] for i in range(len(lengths))]


@pytest.mark.parametrize(
    ("how", "slots", "draft_tokens", "kind"),
    [(HOW, 3, 4, "near"), (HOW, 8, 2, "wrong"), (HOW[:3], 1, 3, "near"), (HOW[1:2], 2, 1, "near"),
     (HOW[1:2], 3, 6, "wrong")],
)  # fmt: skip
@torch.no_grad()
def test_samples_are_the_hosts(models, rounds, monkeypatch, kind, slots, draft_tokens, how):
    """The same seeds give the same texts, whoever chooses the tokens, and whatever else is written."""
    drafter = DraftModel(models[1 if kind == "near" else 2])
    device = Engine(models[0], slots, drafter=drafter, draft_tokens=draft_tokens)
    found = device.write(sampled(how))
    assert rounds
    check_states(models[0], found)
    one = Engine(models[0], 2, drafter=drafter, draft_tokens=draft_tokens).write(sampled(how)[4:6])
    assert [r.tokens for r in one] == [r.tokens for r in found[4:6]]
    monkeypatch.setattr(speculation, "needs_host", lambda *_: "a test")
    del rounds[:]
    host = Engine(models[0], slots, drafter=drafter, draft_tokens=draft_tokens)
    expected = host.write(sampled(how))
    assert not rounds
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert 0 < device.drafts.accepted < device.drafts.proposed


@torch.no_grad()
def test_the_next_round_is_launched_before_the_tokens_of_the_last_are_handled(models, rounds, monkeypatch):
    events, launch, wait = [], draft_rounds.DraftRounds.launch, draft_rounds.Launched.wait
    monkeypatch.setattr(
        draft_rounds.DraftRounds, "launch", lambda self, *a: events.append("launch") or launch(self, *a)
    )
    monkeypatch.setattr(draft_rounds.Launched, "wait", lambda self: events.append("wait") or wait(self))
    engine = Engine(models[0], 1, drafter=DraftModel(models[0]), read_seconds=60)
    engine.submit(requests_of([30])[0])
    for _ in range(4):
        engine.step()
    assert events == ["launch", "launch", "wait", "launch", "wait", "launch", "wait"]


class Letters:
    """Each token is a letter."""

    def decode(self, tokens: list[int], **_) -> str:
        return "".join(chr(65 + t) for t in tokens)


def same_states(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    torch.testing.assert_close(one.ssm_states, other.ssm_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.conv_states, other.conv_states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["near", "wrong"])
@torch.no_grad()
def test_streams(models, rounds, kind):
    """Texts and states of streams, whole, after an end token, and cut by a stop string."""
    model, ids = copy.deepcopy(models[0]), torch.arange(7, dtype=torch.int64)
    drafter = DraftModel(models[1 if kind == "near" else 2])
    free = Stream(model, Letters(), ids, Sampling(0), 60)
    "".join(free)
    for place in range(20, 34):
        for end, stop in (
            ([], ()),
            ([free.tokens[place]], ()),
            ([], (Letters().decode(free.tokens[place : place + 2]),)),
        ):
            model.generation_config.eos_token_id = end
            plain = Stream(model, Letters(), ids, Sampling(0), place + 20, stop)
            "".join(plain)
            stream = SpeculativeStream(model, Letters(), ids, Sampling(0), place + 20, stop, drafter=drafter)
            assert "".join(stream) == plain.text
            assert (stream.tokens, stream.finish_reason) == (plain.tokens, plain.finish_reason)
            same_states(stream.cache, plain.cache)
            assert stream.proposed >= stream.accepted
            assert not stop or plain.finish_reason == "stop"
    assert rounds


@torch.no_grad()
def test_a_draft_model_without_distributions(models, rounds):
    model, broken = models[0], copy.deepcopy(models[1])
    broken.backbone.norm_f.weight[0] = float("nan")
    sampling = Sampling(seed=3)
    with pytest.raises(mambakit.errors.LogitsError, match="no token can be chosen"):
        list(SpeculativeStream(model, Letters(), torch.arange(5), sampling, 20, drafter=DraftModel(broken)))
    with pytest.warns(UserWarning, match="without drafts from now on"):
        found = Engine(model, 3, drafter=DraftModel(broken)).write(requests_of([20, 30], sampling=sampling))
    assert [len(r.tokens) for r in found] == [20, 30]
    assert rounds
    greedy = Engine(model, 3, drafter=DraftModel(broken)).write(requests_of([20, 30]))
    assert [r.tokens for r in greedy] == [r.tokens for r in Engine(model, 3).write(requests_of([20, 30]))]


@torch.no_grad()
def test_a_model_whose_logits_are_no_numbers(models, rounds):
    """That text ends with an error; the others go on."""
    model = copy.deepcopy(models[0])
    how = [Sampling(seed=1), Sampling(seed=2)]
    plain = Engine(model, 2, drafter=DraftModel(models[1])).write(sampled(how, [20, 30]))
    others = {*plain[1].tokens, *plain[0].prompt_ids.tolist(), *plain[1].prompt_ids.tolist()}
    place = next(i for i, token in enumerate(plain[0].tokens) if i > 2 and token not in {*others, *plain[0].tokens[:i]})
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.backbone.embeddings.weight[plain[0].tokens[place]] = float("nan")
    requests = sampled(how, [20, 30])
    engine = Engine(model, 2, drafter=DraftModel(models[1]))
    for request in requests:
        engine.submit(request)
    list(engine.run())
    assert requests[0].finish_reason == "error"
    assert requests[0].tokens == plain[0].tokens[: place + 1]
    assert "no token can be chosen" in requests[0].error
    assert requests[1].tokens == plain[1].tokens
    assert rounds


@torch.no_grad()
def test_generate(models, rounds):
    model, draft = copy.deepcopy(models[0]), models[1]
    ids = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))
    plain = model.generate(ids, max_new_tokens=40, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=40, pad_token_id=0, assistant_model=draft), plain)
    ends = [int(plain[0, 14]), int(plain[1, 25])]
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": ends, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    found = model.generate(ids, **options, assistant_model=draft)
    assert torch.equal(found.sequences, expected.sequences)
    same_states(found.past_key_values, expected.past_key_values)
    drawn = {"max_new_tokens": 30, "do_sample": True, "top_k": 0, "assistant_model": draft}
    many = model.generate(ids, seed=[1, 2, 3], **drawn)
    assert torch.equal(model.generate(ids, seed=[1, 2, 3], **drawn), many)
    assert torch.equal(model.generate(ids[1:2], seed=[2], **drawn), many[1:2]), "a text does not depend on the others"
    assert rounds


@torch.no_grad()
def test_graphs_are_kept_with_the_models(models, rounds, monkeypatch):
    """A second call captures nothing."""
    model, draft = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    made, capture = [], round_graphs.RoundGraphs._captured
    monkeypatch.setattr(round_graphs.RoundGraphs, "_captured", lambda self, *a: made.append(self) or capture(self, *a))
    for _ in range(2):
        model.generate(torch.arange(6)[None], max_new_tokens=30, assistant_model=draft)
        count, made[:] = len(made), []
    assert count == 0
