"""Speculative decoding: greedy text and the state after it are plain decoding's; samples have its distribution."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation.drafters import Draft, DraftModel, PromptLookup
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def draft():
    """Another random model of the same vocabulary: its guesses are mostly wrong."""
    torch.manual_seed(1)
    config = mambakit.MambaConfig(vocab_size=304, hidden_size=16, num_hidden_layers=1, initializer_range=0.3)
    return mambakit.MambaForCausalLM(config).eval()


@pytest.fixture
def ids(both):
    return both[1]("The cat sat on the mat, and the dog", return_tensors="pt").input_ids[0]


class Guesses:
    """A drafter that knows what plain decoding writes, and is wrong at some places."""

    def __init__(self, right: list[int], wrong: set[int] = frozenset()):
        self.right, self.wrong = right, wrong

    def begin(self, ids, sampling, scores, generator):
        self.start = len(ids)

    def propose(self, text, most):
        at = len(text) - self.start
        places = range(at, min(len(self.right), at + most))
        return Draft([self.right[i] ^ (i in self.wrong) for i in places])


def same_state(a, b):
    return (
        torch.equal(a.cache.ssm_states, b.cache.ssm_states)
        and torch.equal(a.cache.conv_states, b.cache.conv_states)
        and a.cache.get_seq_length() == b.cache.get_seq_length()
    )


def run(stream):
    return "".join(stream), stream


@pytest.mark.parametrize("most", [1, 4, 15])
@pytest.mark.parametrize("kind", ["lookup", "same model", "other model", "right", "half wrong"])
def test_greedy_is_plain_decoding(both, draft, ids, kind, most):
    model, tokenizer = both
    text, plain = run(Stream(model, tokenizer, ids, GREEDY, 40))
    drafter = {
        "lookup": PromptLookup(3, 1),
        "same model": DraftModel(model),
        "other model": DraftModel(draft),
        "right": Guesses(plain.tokens),
        "half wrong": Guesses(plain.tokens, set(range(0, 40, 2))),
    }[kind]
    guessed, stream = run(SpeculativeStream(model, tokenizer, ids, GREEDY, 40, drafter=drafter, draft_tokens=most))
    assert stream.tokens == plain.tokens
    assert guessed == text == stream.text
    assert stream.finish_reason == plain.finish_reason == "length"
    assert same_state(stream, plain)
    if kind in ("same model", "right"):
        assert stream.accepted == stream.proposed
        # A text begins with as many guesses as are worthwhile if 4 of 5 are right.
        assert -(-39 // (most + 1)) <= stream.rounds <= {1: 20, 4: 10, 15: 10}[most]
    if kind == "half wrong":
        assert 0 < stream.accepted < stream.proposed or most == 1
    assert len(stream.tokens) == stream.accepted + stream.rounds + 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken", ["model", "draft"])
def test_logits_that_are_no_numbers(both, draft, ids, broken, sampling):
    model, tokenizer = both
    good = model
    model, draft = copy.deepcopy(model), copy.deepcopy(draft)
    with torch.no_grad():
        (model if broken == "model" else draft).backbone.norm_f.weight[0] = float("nan")
    stream = SpeculativeStream(model, tokenizer, ids, sampling, 12, drafter=DraftModel(draft))
    if broken == "draft" and sampling is GREEDY:  # its guesses are wrong, and that is all
        assert "".join(stream) == "".join(Stream(good, tokenizer, ids, GREEDY, 12))
    else:
        with pytest.raises(RuntimeError, match="no token can be chosen"):
            list(stream)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_greedy_with_other_weights(both, ids, dtype, tmp_path):
    save_tiny(tmp_path, hidden_size=32)
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    model = model.bfloat16() if dtype == "bfloat16" else model.quantize(dtype, 32)
    _, plain = run(Stream(model, both[1], ids, GREEDY, 60))
    drafter = Guesses(plain.tokens, {3, 4, 11, 20, 33})
    _, stream = run(SpeculativeStream(model, both[1], ids, GREEDY, 60, drafter=drafter))
    assert stream.tokens == plain.tokens
    assert same_state(stream, plain)


@pytest.mark.parametrize("place", range(8, 16))
def test_ends_and_stop_strings_inside_a_round(both, ids, place):
    """Wherever the text is over, among the guesses or after them, text and state are plain decoding's."""
    model, tokenizer = both
    _, free = run(Stream(model, tokenizer, ids, GREEDY, 30))
    model.generation_config.eos_token_id = free.tokens[place]
    try:
        _, plain = run(Stream(model, tokenizer, ids, GREEDY, 30))
        _, stream = run(SpeculativeStream(model, tokenizer, ids, GREEDY, 30, drafter=Guesses(free.tokens)))
    finally:
        model.generation_config.eos_token_id = None
    assert stream.tokens == plain.tokens
    assert stream.finish_reason == "stop"
    assert same_state(stream, plain)
    stop = (tokenizer.decode(free.tokens[place : place + 2]), "never this")
    text, plain = run(Stream(model, tokenizer, ids, GREEDY, 30, stop))
    again, stream = run(SpeculativeStream(model, tokenizer, ids, GREEDY, 30, stop, drafter=Guesses(free.tokens)))
    assert (again, stream.tokens, stream.finish_reason) == (text, plain.tokens, plain.finish_reason)
    assert same_state(stream, plain)


def test_penalty_and_constraint(both, ids):
    pytest.importorskip("llguidance")
    from mambakit.generation.constrain import Constraint

    model, tokenizer = both
    for sampling in (Sampling(0, repetition_penalty=1.4), Sampling(0, top_k=3)):
        _, plain = run(Stream(model, tokenizer, ids, sampling, 30))
        for drafter in (Guesses(plain.tokens, {4, 9}), PromptLookup(2, 1), DraftModel(model)):
            _, stream = run(SpeculativeStream(model, tokenizer, ids, sampling, 30, drafter=drafter))
            assert stream.tokens == plain.tokens
    model.generation_config.eos_token_id = 0
    try:
        sampling = Constraint(model, tokenizer, regex="(the (cat|dog|mat)[,.] ){3}").sampling(GREEDY)
        text, plain = run(Stream(model, tokenizer, ids, sampling, 40))
        for drafter in (Guesses(plain.tokens, {2, 5}), PromptLookup(2, 1), DraftModel(model)):
            again, stream = run(SpeculativeStream(model, tokenizer, ids, sampling, 40, drafter=drafter))
            assert (again, stream.finish_reason) == (text, plain.finish_reason)
    finally:
        model.generation_config.eos_token_id = None


def test_continuing_from_a_state(both, ids):
    model, tokenizer = both
    with torch.no_grad():
        cache = model(ids[None], use_cache=True).cache_params
    more = tokenizer(" slept by the", return_tensors="pt").input_ids[0]
    _, plain = run(Stream(model, tokenizer, more, GREEDY, 20, cache=cache.clone()))
    for drafter in (PromptLookup(2, 1), DraftModel(model)):
        _, stream = run(SpeculativeStream(model, tokenizer, more, GREEDY, 20, cache=cache.clone(), drafter=drafter))
        assert stream.tokens == plain.tokens
        assert same_state(stream, plain)
    state = State.read(model, ids)
    _, plain = run(Stream(model, tokenizer, **state.prompt(), sampling=GREEDY, max_new_tokens=20))
    options = {"sampling": GREEDY, "max_new_tokens": 20, "drafter": DraftModel(model)}
    _, blind = run(SpeculativeStream(model, tokenizer, **state.prompt(), **options))
    _, told = run(SpeculativeStream(model, tokenizer, **state.prompt(), context=ids[:-1], **options))
    assert blind.tokens == told.tokens == plain.tokens
    assert told.accepted == told.proposed, "a drafter that knows what was read guesses better"
    assert blind.accepted < blind.proposed


def test_prompt_lookup_finds_the_latest_longest_run():
    lookup = PromptLookup(3, 1)
    lookup.begin(torch.tensor([1]), GREEDY, None, None)
    text = [1, 2, 3, 9, 9, 2, 3, 4, 5, 7, 3, 8, 2, 3]
    assert lookup.propose(text, 3).tokens == [4, 5, 7], "after 2 3, not after the later 3"
    assert lookup.propose([*text, 4], 2).tokens == [5, 7]
    assert lookup.propose([*text, 99], 2).tokens == []
    assert lookup.propose([*text, 99, 8], 9).tokens == [2, 3, 99, 8]
    pairs = PromptLookup(4, 2)
    pairs.begin(torch.tensor([1]), GREEDY, None, None)
    assert pairs.propose([3], 2).tokens == []
    assert pairs.propose([3, 3], 2).tokens == []
    assert pairs.propose([3, 3, 3], 2).tokens == [3], "the run two before the end is followed by one token"
    assert pairs.propose([3, 3, 3, 5, 1, 3], 2).tokens == []
    assert pairs.propose([3, 3, 3, 5, 1, 3, 3], 2).tokens == [5, 1], "the latest of the runs of two"


def test_prompt_lookup_is_quick_and_small():
    """A long text of one token alone: every place is like every other."""
    lookup = PromptLookup()
    lookup.begin(torch.tensor([1]), GREEDY, None, None)
    text = [1] * 200_000
    began = time.perf_counter()
    assert lookup.propose(text, 3).tokens == [1]
    for _ in range(100):
        text.append(1)
        assert lookup.propose(text, 3).tokens == [1]
    assert time.perf_counter() - began < 5
    assert len(lookup._latest) == 2


@pytest.mark.parametrize(("kind", "penalised"), [("lookup", False), ("draft", False), ("draft", True)])
def test_samples_have_the_models_distribution(both, kind, penalised):
    """Three tokens from whole streams against their exact probabilities, by chi-square at fixed seeds."""
    how = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {2: 0.5}} if penalised else {}

    def distribution(logits, written):
        """(5,) from what the model says, after these tokens of the text."""
        if penalised:
            counts = torch.bincount(torch.tensor(written, dtype=torch.int64), minlength=5).float()
            logits = logits + 0.5 * (torch.arange(5) == 2) - 0.7 * (counts > 0) - 0.4 * counts
        return logits.softmax(-1)

    torch.manual_seed(3)
    config = mambakit.MambaConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, initializer_range=0.8, eos_token_id=None
    )
    model, other = (mambakit.MambaForCausalLM(config).eval() for _ in range(2))
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([1, 2, 1, 3, 1])
    with torch.no_grad():
        first = distribution(model(prompt[None]).logits[0, -1], [])
        exact = {}
        for a, b in itertools.product(range(5), repeat=2):
            logits = model(torch.tensor([[*prompt.tolist(), a, b]])).logits[0]
            second, third = distribution(logits[-2], [a]), distribution(logits[-1], [a, b])
            for c in range(5):
                exact[a, b, c] = float(first[a] * second[b] * third[c])
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    drafter = PromptLookup(1, 1) if kind == "lookup" else DraftModel(other)
    draws, counts, accepted, proposed = 600, dict.fromkeys(exact, 0), 0, 0
    for seed in range(draws):
        stream = SpeculativeStream(
            model, both[1], prompt, Sampling(seed=seed, **how), 3, drafter=drafter, draft_tokens=2
        )
        list(stream)
        counts[tuple(stream.tokens)] += 1
        accepted, proposed = accepted + stream.accepted, proposed + stream.proposed
    assert 0.1 < accepted / proposed < 0.9, "or one of the two branches is not tested"
    # Cells too rare for the approximation are taken together.
    rare = [key for key, p in exact.items() if p * draws < 5]
    cells = [(counts[k], exact[k] * draws) for k in exact if k not in rare]
    cells.append((sum(counts[k] for k in rare), sum(exact[k] for k in rare) * draws))
    statistic = sum((count - expected) ** 2 / max(expected, 1e-9) for count, expected in cells)
    degrees = len(cells) - 1
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5  # about 0.1 %


def test_the_embedded_model_guessed_by_its_quantised_self():
    path = default_model_path()
    model, small = (mambakit.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for _ in range(2))
    small.quantize("int4")
    tokenizer = mambakit.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("The old man looked at the sea and", return_tensors="pt").input_ids[0]
    text, plain = run(Stream(model, tokenizer, ids, GREEDY, 40))
    again, stream = run(SpeculativeStream(model, tokenizer, ids, GREEDY, 40, drafter=DraftModel(small)))
    assert again == text
    assert stream.tokens == plain.tokens
    assert stream.accepted / stream.proposed > 0.5


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_on_a_gpu(both, ids, kind, tmp_path):
    save_tiny(tmp_path, hidden_size=64)
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval().cuda()
    model.generation_config.eos_token_id = None
    _, plain = run(Stream(model, both[1], ids, GREEDY, 40))
    drafter = PromptLookup(2, 1) if kind == "lookup" else DraftModel(model)
    _, stream = run(SpeculativeStream(model, both[1], ids, GREEDY, 40, drafter=drafter))
    assert stream.tokens == plain.tokens
    assert torch.allclose(stream.cache.ssm_states, plain.cache.ssm_states, rtol=1e-3, atol=1e-5)
    _, sampled = run(SpeculativeStream(model, both[1], ids, Sampling(seed=0, top_k=20), 40, drafter=drafter))
    assert len(sampled.tokens) == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, t, i: SpeculativeStream(m, t, i, draft_tokens=0), "draft_tokens is 0"),
        (lambda m, t, i: SpeculativeStream(m, t, i, draft_tokens=16), "between 1 and 15"),
        (lambda m, t, i: PromptLookup(2, 3), "shortest is 3 and longest 2"),
        (lambda m, t, i: SpeculativeStream(m, t, i[:0]), "l >= 1"),
    ],
)
def test_bad_values(both, ids, make, message):
    with pytest.raises(ValueError, match=message):
        make(*both, ids)


def test_vocabularies_must_agree(both, ids):
    config = mambakit.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="vocabulary of 61 tokens and the model one of 304"):
        SpeculativeStream(*both, ids, drafter=DraftModel(mambakit.MambaForCausalLM(config)))


@pytest.mark.cuda
@pytest.mark.parametrize("most", [1, 4, 7, 12])
@pytest.mark.parametrize("kind", ["same model", "other model", "lookup", "half wrong"])
def test_the_persistent_kernel(ids, kind, most):
    """The persistent kernel up to 8 tokens at a time, graphs beyond; tokens are plain decoding's where bits are."""
    torch.manual_seed(0)
    shape = {"vocab_size": 304, "time_step_rank": 16, "num_hidden_layers": 2}
    model, other = (
        mambakit.MambaForCausalLM(mambakit.MambaConfig(hidden_size=h, **shape)).to("cuda", torch.bfloat16).eval()
        for h in (256, 128)
    )
    model.generation_config.eos_token_id = None
    letters = mambakit.AutoTokenizer.from_pretrained(default_model_path())
    _, plain = run(Stream(model, letters, ids, GREEDY, 40))
    drafter = {
        "lookup": PromptLookup(3, 1),
        "same model": DraftModel(model),
        "other model": DraftModel(other),
        "half wrong": Guesses(plain.tokens, set(range(0, 40, 2))),
    }[kind]
    for _ in range(2):  # a drafter serves one text after the other
        _, stream = run(SpeculativeStream(model, letters, ids, GREEDY, 40, drafter=drafter, draft_tokens=most))
        if most < 8:
            assert stream.tokens == plain.tokens
            assert same_state(stream, plain)
            if kind == "same model":
                assert stream.accepted == stream.proposed
        else:
            assert len(stream.tokens) == 40
