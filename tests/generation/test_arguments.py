"""Token ids and texts as callers give them: every public function takes the same, and refuses the rest by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mambakit
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.drafters import PromptLookup
from mambakit.generation.embed import embed
from mambakit.generation.engine import Engine
from mambakit.generation.logprobs import echo, token_log_probs
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.request import Request
from mambakit.generation.score import score_choices, score_continuations
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.state import State
from mambakit.generation.stream import Stream
from mambakit.generation.stream_scorer import StreamScorer
from tests.models.tiny import save_tiny

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    model = mambakit.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(path)


def state_of(model, state):
    return model.generate(**state.inputs(), max_new_tokens=3, do_sample=False)[0, -3:].tolist()


def engine_of(model, ids):
    engine = Engine(model, slots=1)
    engine.submit(Request(ids, GREEDY, max_new_tokens=3))
    return [token for _, token in engine.run()]


# What a function does with the tokens of one text: results that can be compared.
READERS = {
    "State.read": lambda m, t, ids: state_of(m, State.read(m, ids)),
    "State.extend": lambda m, t, ids: state_of(m, State.read(m, [3]).extend(m, ids)),
    "PrefixCache.read": lambda m, t, ids: state_of(m, PrefixCache(m).read(ids)),
    "PrefixCache.lookup": lambda m, t, ids: PrefixCache(m).lookup(ids)[0],
    "PrefixCache.store": lambda m, t, ids: PrefixCache(m).store(ids, m.backbone.new_cache(1)),
    "Engine": lambda m, t, ids: engine_of(m, ids),
    "Stream": lambda m, t, ids: list(Stream(m, t, ids, GREEDY, max_new_tokens=3)),
    "SpeculativeStream": lambda m, t, ids: list(
        SpeculativeStream(m, t, ids, GREEDY, max_new_tokens=3, drafter=PromptLookup())
    ),
    "StreamScorer": lambda m, t, ids: StreamScorer(m, t).score_tokens({"a": ids})["a"].tolist(),
    "prefix": lambda m, t, ids: score_continuations(m, ids, [[1]])[0].log_prob,
    "continuation": lambda m, t, ids: score_continuations(m, [1], [ids])[0].log_prob,
    "token_log_probs": lambda m, t, ids: token_log_probs(m, ids, before=1).log_probs.tolist(),
    "echo": lambda m, t, ids: echo(m, t, ids),
}
IDS = [5, 9, 2, 7]


@pytest.mark.parametrize("reader", READERS)
def test_tokens_of_any_kind_of_sequence(both, reader):
    expected = READERS[reader](*both, torch.tensor(IDS))
    for same in (IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.int32), torch.tensor(IDS, dtype=torch.uint8)):
        assert READERS[reader](*both, same) == expected, type(same)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "wrong",
    [
        [1.5], torch.tensor([1.0, 2.0]), [True], "12", b"12", None, 5, [None], ["1"], [-1], [1, 10**6], [10**30],
        torch.tensor(3), torch.zeros(1, 1, 2, dtype=torch.int64), np.array([1.5]),
    ],
    ids=str,
)  # fmt: skip
def test_what_are_no_tokens(both, reader, wrong):
    """Never cut to whole numbers, never read character by character, never an index error of an embedding."""
    with pytest.raises((TypeError, ValueError), match=r"tokens?\b|token ids|expected \(l,\)"):
        READERS[reader](*both, wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, t: StreamScorer(m, t).score_lines({"a": "one\n"}),
            r"lines of 'a' are 'one\\n'; give a list of texts",
        ),
        (lambda m, t: StreamScorer(m, t).score_lines({"a": iter(["one\n"])}), "give a list of texts"),
        (lambda m, t: StreamScorer(m, t).score_lines({"a": ["x"], "b": ["y", None]}), "lines of 'b': number 1 is None"),
        (lambda m, t: StreamScorer(m, t).score_lines({"a": [b"x"]}), "must be text"),
        (lambda m, t: StreamScorer(m, t).score_lines({"a": ["\ud800"]}), "half of a surrogate pair"),
        (lambda m, t: StreamScorer(m, t).score_lines([("a", ["x"])]), "give a dictionary"),
        (lambda m, t: StreamScorer(m, t).score_tokens(None), "give a dictionary"),
        (lambda m, t: score_choices(m, t, "The", " cat"), r"choices are ' cat'; give a list of texts, as \[' cat'\]"),
        (lambda m, t: score_choices(m, t, "The", [" cat", 3]), "choices: number 1 is 3"),
        (lambda m, t: score_choices(m, t, None, [" cat"]), "prefix is None"),
        (lambda m, t: embed(m, t, ["a", None]), "texts: number 1 is None"),
        (lambda m, t: token_log_probs(m, [1, 2], top=1.5), "top is 1.5"),
    ],
)
def test_what_are_no_texts(both, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(*both)
