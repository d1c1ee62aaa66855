"""What a request may say; no server runs."""

from __future__ import annotations

import pytest

from mambakit.serving.api.asked import parse_body
from mambakit.serving.api.checks import check_length
from mambakit.serving.api.completions import parse
from mambakit.serving.api.declarations import Limits
from mambakit.serving.errors import ApiError

LIMITS = Limits(model="m", vocab_size=300, max_new_tokens=100, max_prompt_tokens=5, most_texts=10)


def refused(**body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse({"prompt": "x"} | body, LIMITS)
    return caught.value


def test_defaults_are_those_of_the_api():
    asked = parse({"prompt": "x", "model": "m", "user": "somebody", "seed": None}, LIMITS)
    assert asked.prompts == ["x"]
    assert (asked.max_tokens, asked.n, asked.stop, asked.stream, asked.echo) == (16, 1, (), False, False)
    assert asked.sampling == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None,
        "typical_p": 1.0, "epsilon_cutoff": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt, prompts):
    assert parse({"prompt": prompt}, LIMITS).prompts == prompts


def test_the_copies_of_a_seeded_request_have_seeds_of_their_own():
    asked = parse({"prompt": "x", "seed": 5, "n": 3}, LIMITS)
    assert [asked.sampling_of(copy)["seed"] for copy in range(asked.n)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", -1, "temperature is -1; it must be a number, at least 0 and at most 2"),
        ("temperature", float("nan"), "temperature is NaN"),
        ("temperature", "hot", 'temperature is "hot"; it must be a number'),
        ("temperature", True, "temperature is true"),
        ("top_p", 0, "top_p is 0; it must be a number, above 0 and at most 1"),
        ("top_k", 1.5, "top_k is 1.5; it must be a whole number"),
        ("min_p", 2, "min_p is 2"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("seed", 1 << 63, "seed is 9223372036854775808"),
        ("max_tokens", 0, "max_tokens is 0; it must be a whole number, at least 1 and at most 100"),
        ("max_tokens", 101, "at most 100"),
        ("n", 0, "n is 0"),
        ("n", 11, "at most 10 can run and wait"),
        ("stream", "yes", 'stream is "yes"; it must be true or false'),
        ("stop", ["a", "b", "c", "d", "e"], "stop has 5 strings; at most 4"),
        ("stop", "", "none of them empty"),
        ("stop", [1], "a list of strings"),
        ("stream_options", {"include_usage": True}, "add stream: true"),
        ("prompt", None, "there is no prompt"),
        ("prompt", [], "not empty"),
        ("prompt", [[]], "no token ids"),
        ("prompt", [1, 300], "they are 0 to 299"),
        ("prompt", [True], "a list of token ids"),
        ("prompt", ["a", 1], "a list of token ids"),
        ("prompt", "\ud800", "half of a surrogate pair"),
        ("logprobs", 1, "logprobs is not served; leave it out; `mambakit score`"),
        ("logprobs", 0, "not served"),
        ("logit_bias", {"5": 1}, "not served"),
        ("presence_penalty", 2.5, "at least -2 and at most 2"),
        ("frequency_penalty", -2.5, "at least -2 and at most 2"),
        ("best_of", 2, "n gives several texts"),
        ("suffix", "end", "only continues"),
        ("messages", [], "there is no field"),
        ("max_token", 3, "did you mean 'max_tokens'?"),
    ],
)
def test_refusals_name_field_value_and_remedy(field, value, says):
    error = refused(**{field: value})
    assert error.status == 400
    assert says in error.message
    assert error.body["error"]["type"] == "invalid_request_error"
    if "there is no field" not in error.message:
        assert error.body["error"]["param"] == field


def test_values_that_ask_for_nothing_are_taken():
    parse({"prompt": "x", "logprobs": None, "logit_bias": {}, "presence_penalty": 0, "best_of": 1, "n": None}, LIMITS)


def test_other_refusals():
    error = refused(model="other")
    assert (error.status, error.code) == (404, "model_not_found")
    assert "'m' alone" in error.message
    unknown = parse_raises({"prompt": "x", "stream": True, "stream_options": {"chunk": 1}})
    assert "served are stream_options.include_usage" in unknown.message
    for body in (b"{", b"\xff", b"[" * 100_000, b"[]"):
        with pytest.raises(ApiError, match="not JSON|a JSON list"):
            parse_body(body)
    check_length(5, LIMITS)
    with pytest.raises(ApiError, match="has 6 tokens; at most 5"):
        check_length(6, LIMITS)


def parse_raises(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, LIMITS)
    return caught.value
