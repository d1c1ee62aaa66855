"""Requests for scores and for tokens; no server runs."""

from __future__ import annotations

import json
from array import array

import pytest

from mambakit.serving.api.answers import Usage
from mambakit.serving.api.declarations import Limits
from mambakit.serving.api.prompts import Codec
from mambakit.serving.api.score import answer, prepare
from mambakit.serving.api.tokens import token_ids, tokenise
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Continuation
from tests.serving.api_server import byte_tokenizer

LIMITS = Limits(model="m", vocab_size=256, max_prompt_tokens=30, most_texts=3)
CODEC = Codec(byte_tokenizer())


def ids(content: bytes) -> list[int]:
    return array("q", content).tolist()


def encode(text: str) -> list[int]:
    return CODEC.encode(text, LIMITS)


def prepared(**body):
    return prepare(json.dumps(body).encode(), CODEC, LIMITS)


def refused(read=prepare, **body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(json.dumps(body).encode(), CODEC, LIMITS)
    return caught.value


def test_text():
    found = prepared(prompt="The cat ", continuations=["sat", "is"], log_probs=True)
    (prefix,) = found.prefixes
    assert ids(prefix.ids) == encode("The cat")  # the blank counts as the continuation's
    assert [ids(one) for one in prefix.continuations] == [encode(" sat"), encode(" is")]
    assert prefix.places == (0, 1)
    assert found.log_probs


def test_ids():
    (prefix,) = prepared(prompt=[1, 2.0], continuations=[[3], "ab"]).prefixes
    assert ids(prefix.ids) == [1, 2]
    assert [ids(one) for one in prefix.continuations] == [[3], encode("ab")]
    (one,) = prepared(prompt="ab ", continuations=[[3]]).prefixes
    assert ids(one.ids) == encode("ab ")
    (empty,) = prepared(prompt="", continuations=["ab"]).prefixes
    assert ids(empty.ids) == [0]  # the tokenizer's start
    assert [ids(one) for one in empty.continuations] == [encode("ab")]


def test_prefixes_that_differ_are_jobs_of_their_own():
    first, second = prepared(prompt="ab ", continuations=["c", [3], "d"]).prefixes
    assert (first.places, second.places) == ((0, 2), (1,))
    assert ids(first.ids) == encode("ab")
    assert ids(second.ids) == encode("ab ")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"continuations": ["a"]}, "prompt", "there is no prompt"),
        ({"prompt": "a"}, "continuations", "there is no continuations"),
        ({"prompt": "a", "continuations": []}, "continuations", "not empty"),
        ({"prompt": "a", "continuations": "b"}, "continuations", "it must be a list"),
        ({"prompt": "a", "continuations": [""]}, "continuations[0]", "is empty"),
        ({"prompt": "a", "continuations": [5]}, "continuations", "continuations[0] is 5"),
        ({"prompt": "a", "continuations": [[]]}, "continuations", "there are no token ids"),
        ({"prompt": "a", "continuations": [[256]]}, "continuations", "they are 0 to 255"),
        ({"prompt": "a", "continuations": ["a"] * 1025}, "continuations", "has 1,025 entries; at most 1,024"),
        ({"prompt": "a" * 31, "continuations": ["b"]}, "prompt", "has 31 tokens; at most 30"),
        ({"prompt": "a", "continuations": ["b" * 20, "c" * 20]}, "continuations", "has 40 tokens; at most 30"),
        ({"prompt": "a", "continuations": ["b"], "n": 2}, "n", "there is no field"),
    ],
)
def test_refusals(body, param, says):
    error = refused(**body)
    assert (error.status, error.param) == (400, param)
    assert says in error.message


def test_the_answer_has_no_infinite_number():
    scores = [Continuation(array("f", [-1.0, -float("inf")]).tobytes(), False), Continuation(b"", True)]
    body = answer("m", scores, Usage([5]), shown=True)
    json.dumps(body, allow_nan=False)
    assert body["data"][0] == {
        "index": 0, "log_prob": -10000.0, "tokens": 2, "greedy": False, "log_probs": [-1.0, -9999.0],
    }  # fmt: skip
    assert "log_probs" not in answer("m", scores, Usage([5]), shown=False)["data"][0]


def test_tokens():
    found = tokenise(b'{"prompt": "The cat", "return_token_strs": true}', CODEC, LIMITS)
    assert (found.ids, found.with_texts) == (encode("The cat"), True)
    assert tokenise(b'{"prompt": ""}', CODEC, LIMITS).ids == []
    assert token_ids(b'{"tokens": [1, 2.0]}', CODEC, LIMITS) == [1, 2]
    assert "give one of them" in refused(tokenise).message
    assert refused(tokenise, messages=[{"role": "user", "content": "a"}]).code == "chat_template_missing"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.special_tokens_map = "{{ messages[0].content }}", {}
    chat = b'{"messages": [{"role": "user", "content": "ab"}]}'
    assert tokenise(chat, Codec(tokenizer), LIMITS).ids == encode("ab")
    assert "they are 0 to 255" in refused(token_ids, tokens=[256]).message
    assert "must be a list" in refused(token_ids, tokens="a").message
