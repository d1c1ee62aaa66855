"""What a request may say; no server runs."""

from __future__ import annotations

import json

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
    [
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([1, 2.0], [[1, 2]]),
        ([[3.0]], [[3]]),
    ],
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
        ("prompt", [300], "they are 0 to 299"),
        ("logprobs", 21, "logprobs is 21; it must be a whole number, at least 0 and at most 20"),
        ("logprobs", True, "logprobs is true; it must be a whole number"),
        ("logit_bias", {"300": 1}, 'a token of logit_bias is "300"; they are 0 to 299'),
        ("logit_bias", {"a": 1}, 'a token of logit_bias is "a"'),
        ("logit_bias", {"5": 101}, "at least -100 and at most 100"),
        ("logit_bias", [1], "it must be an object of token ids and numbers"),
        ("logit_bias", {str(i): 0 for i in range(1025)}, "has 1,025 tokens; at most 1,024"),
        ("min_tokens", 17, "min_tokens is 17, more than the limit of 16 new tokens"),
        ("metadata", {"a": 1}, "it must be an object of strings"),
        ("metadata", {"a": "x" * 513}, "values up to 512"),
        ("metadata", {str(i): "" for i in range(17)}, "has 17 entries; at most 16"),
        ("regex", 5, "regex is 5; it must be a string"),
        ("grammar", "x" * 65537, "has 65,537 characters; at most 65,536"),
        ("response_format", "json", "it must be an object of type, json_schema"),
        ("ignore_eos", 1, "it must be true or false"),
        ("presence_penalty", 2.5, "at least -2 and at most 2"),
        ("frequency_penalty", -2.5, "at least -2 and at most 2"),
        ("best_of", 11, "at most 10 can run and wait"),
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
    parse({"prompt": "x", "response_format": {"type": "text"}, "suffix": "", "metadata": {}, "min_tokens": 0}, LIMITS)


def test_the_limit_of_tokens_by_both_names():
    assert parse({"prompt": "x", "max_completion_tokens": 3}, LIMITS).max_tokens == 3
    assert parse({"prompt": "x", "max_completion_tokens": 3, "max_tokens": 3}, LIMITS).max_tokens == 3
    assert parse({"prompt": "x", "max_completion_tokens": None}, LIMITS).max_tokens == 16
    assert parse({"prompt": "x", "max_completion_tokens": 0, "echo": True}, LIMITS).max_tokens == 0
    assert "give one of them" in refused(max_completion_tokens=3, max_tokens=16).message
    assert "at least 1" in refused(max_completion_tokens=0).message


def test_options_of_a_text():
    asked = parse({"prompt": "x", "logprobs": 0, "echo": True, "max_tokens": 0, "metadata": {"a": "b"}}, LIMITS)
    assert (asked.max_tokens, asked.options.log_probs, asked.options.prompt_log_probs) == (0, 0, True)
    assert asked.shows_log_probs
    assert asked.metadata == {"a": "b"}
    asked = parse({"prompt": "x", "best_of": 3, "n": 2, "logit_bias": {"7": -100}, "ignore_eos": True}, LIMITS)
    assert (asked.options.log_probs, asked.shows_log_probs, asked.best_of, asked.n) == (0, False, 3, 2)
    assert asked.options.ignore_ends
    assert asked.sampling["logit_bias"] == {7: -100.0}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            ("json_schema", json.dumps(SCHEMA)),
        ),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"grammar": 'start: "a"', "response_format": {"type": "text"}}, ("grammar", 'start: "a"')),
    ],
)
def test_forms(fields, constraint):
    assert parse({"prompt": "x", **fields}, LIMITS).options.constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no json_schema; give one"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text' or 'json_object'"),
        ({"response_format": {}}, "response_format.type", "there is no response_format.type"),
        ({"response_format": {"type": "text", "schema": 1}}, "response_format.schema", "did you mean"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 1}}},
            "response_format.json_schema.schema",
            "it must be a JSON schema",
        ),
        ({"regex": "a", "grammar": "b"}, "grammar", "regex and grammar each say which form"),
        ({"regex": "a", "min_tokens": 2}, "min_tokens", "a grammar says where the text ends"),
        ({"best_of": 2, "n": 3}, "best_of", "less than n"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", "leave stream out"),
    ],
)
def test_fields_that_contradict_each_other(fields, param, says):
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    assert says in error.message


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
