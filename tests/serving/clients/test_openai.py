"""The real `openai` client: synchronous, asynchronous, streaming."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest
import torch

import mambakit
from mambakit.generation.engine import Engine, Request
from mambakit.generation.logprobs import echo
from mambakit.generation.score import score_choices

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The cat sat"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(chat_model):
    model = mambakit.AutoModelForCausalLM.from_pretrained(chat_model, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(chat_model)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_a_completion_and_its_stream(client, loaded):
    model, tokenizer = loaded
    ids = tokenizer("The cat", add_special_tokens=False, return_tensors="pt").input_ids[0]
    (alone,) = Engine(model, 1).write([Request(ids, max_new_tokens=12)])
    asked = {"model": "tiny", "prompt": "The cat", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == tokenizer.decode(alone.tokens)
    assert whole.usage.completion_tokens == 12
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage
    assert pieces[-2].choices[0].finish_reason == "length"


def test_log_probabilities_of_a_completion(client, loaded):
    model, tokenizer = loaded
    prompt = "The cat — naïve 日本"
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 3, "seed": 1}
    whole = client.completions.create(**asked, echo=True, max_tokens=8).choices[0]
    expected = echo(model, tokenizer, torch.tensor(tokenizer.encode(whole.text, add_special_tokens=False)), top=3)
    if expected["tokens"] == whole.logprobs.tokens:  # the text may be tokenised in another way
        assert whole.logprobs.token_logprobs[1:] == pytest.approx(expected["token_logprobs"][1:], abs=1e-3)
        assert whole.logprobs.text_offset == expected["text_offset"]
    assert whole.text.startswith(prompt)
    assert whole.logprobs.token_logprobs[0] is None
    assert whole.logprobs.top_logprobs[0] is None
    prompt_only = client.completions.create(**asked, echo=True, max_tokens=0).choices[0]
    n = len(prompt_only.logprobs.tokens)
    assert prompt_only.text == prompt
    assert prompt_only.logprobs.tokens == whole.logprobs.tokens[:n]
    assert prompt_only.logprobs.token_logprobs == whole.logprobs.token_logprobs[:n]
    text_only = client.completions.create(**asked, max_tokens=8).choices[0]
    assert text_only.logprobs.tokens == whole.logprobs.tokens[n:]
    assert text_only.logprobs.token_logprobs == pytest.approx(whole.logprobs.token_logprobs[n:], abs=1e-4)
    assert text_only.logprobs.text_offset[0] == 0
    assert whole.logprobs.text_offset[n] == len(prompt)
    for own, token, best in zip(
        text_only.logprobs.token_logprobs, text_only.logprobs.tokens, text_only.logprobs.top_logprobs, strict=True
    ):
        assert len(best) == 3  # greedy: the token is the likeliest
        assert best[token] == own == max(best.values())
    streamed = list(client.completions.create(**asked, echo=True, max_tokens=8, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [
            one for event in streamed if event.choices[0].logprobs for one in getattr(event.choices[0].logprobs, name)
        ]
        assert joined == getattr(whole.logprobs, name)


def test_a_stop_string_has_no_log_probabilities(client):
    asked = {"model": "tiny", "prompt": "The cat", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    free = client.completions.create(**asked).choices[0]
    at = len(free.text) // 2
    stop = free.text[at : at + 3]
    found = client.completions.create(**asked, stop=stop).choices[0]
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)]
    n = len(found.logprobs.tokens)
    assert found.logprobs.tokens == free.logprobs.tokens[:n]
    assert all(offset < max(1, len(found.text)) for offset in found.logprobs.text_offset)


def test_several_texts_and_the_best_of_them(client):
    asked = {"model": "tiny", "prompt": ["The cat", "The dog"], "max_tokens": 5, "seed": 3, "logprobs": 0}
    all_four = client.completions.create(**asked, n=4).choices
    best = client.completions.create(**asked, n=2, best_of=4).choices
    assert [choice.index for choice in best] == [0, 1, 2, 3]
    for prompt in range(2):
        group = all_four[4 * prompt : 4 * prompt + 4]
        ranked = sorted(group, key=lambda one: -sum(one.logprobs.token_logprobs) / max(1, len(one.logprobs.tokens)))
        assert [one.text for one in best[2 * prompt : 2 * prompt + 2]] == [one.text for one in ranked[:2]]
    quiet = client.completions.create(**{**asked, "logprobs": None}, n=2, best_of=4).choices
    assert [one.text for one in quiet] == [one.text for one in best]
    assert quiet[0].logprobs is None


def test_biases_penalties_and_ends(client, loaded):
    _, tokenizer = loaded
    asked = {"model": "tiny", "prompt": "The cat", "max_tokens": 6, "temperature": 0}
    the = tokenizer.encode(" the", add_special_tokens=False)
    forced = client.completions.create(**asked, logit_bias={str(the[0]): 100})
    assert forced.choices[0].text == tokenizer.decode(the[:1]) * 6
    penalties = {"frequency_penalty": 2, "presence_penalty": 2}
    plain = client.completions.create(**asked, logit_bias={str(the[0]): 8}, extra_body={"min_tokens": 6})
    varied = client.completions.create(**asked, **penalties, logit_bias={str(the[0]): 8}, extra_body={"min_tokens": 6})
    assert varied.choices[0].text != plain.choices[0].text
    ended = client.completions.create(**asked, logit_bias={"0": 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    least = client.completions.create(**asked, logit_bias={"0": 100}, extra_body={"min_tokens": 3})
    assert least.usage.completion_tokens == 3
    ignored = client.completions.create(**asked, logit_bias={"0": 100}, extra_body={"ignore_eos": True})
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (6, "length")


def test_a_chat_and_its_stream(client, loaded):
    model, tokenizer = loaded
    ids = torch.tensor(tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False))
    (alone,) = Engine(model, 1).write([Request(ids, max_new_tokens=10)])
    asked = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**asked, metadata={"for": "a test"}, user="u")
    assert whole.choices[0].message.content == tokenizer.decode(alone.tokens)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(ids)
    assert whole.metadata == {"for": "a test"}
    events = list(client.chat.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        deltas = [choice for event in events for choice in event.choices if choice.index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
        assert deltas[-1].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 20
    with client.chat.completions.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(pieces) == whole.choices[0].message.content


def test_log_probabilities_of_a_chat(client):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    assert b"".join(bytes(one.bytes) for one in whole.logprobs.content).decode() == whole.message.content
    for one in whole.logprobs.content:
        assert one.logprob == one.top_logprobs[0].logprob
        assert one.token == one.top_logprobs[0].token
        assert len(one.top_logprobs) == 2
    events = list(client.chat.completions.create(**asked, stream=True))
    streamed = [one for event in events if event.choices[0].logprobs for one in event.choices[0].logprobs.content]
    assert streamed == whole.logprobs.content


def test_tool_calls(client):
    """A grammar makes the random model call a tool."""
    call = '<tool_call>{"name": "look", "arguments": {"at": "this"}}</tool_call>'
    asked = {
        "model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 150,
        "extra_body": {"regex": call.replace("{", "\\{").replace("}", "\\}")},
    }  # fmt: skip
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls[0].function.name == "look"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"at": "this"}
    events = list(client.chat.completions.create(**asked, stream=True))
    (delta,) = [one for event in events for one in event.choices[0].delta.tool_calls or []]
    assert (delta.index, delta.function.name) == (0, "look")
    assert events[-1].choices[0].finish_reason == "tool_calls"
    answered = [
        *HELLO,
        choice.message,
        {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "seen"},
    ]
    assert client.chat.completions.create(model="tiny", messages=answered, tools=TOOLS, max_tokens=3).choices


def test_thoughts(client):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "extra_body": {"regex": "<think>ab</think>cd"}}
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.reasoning_content, message.content) == ("ab", "cd")


def test_forms(client):
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, max_tokens=100, seed=seed
        )
        found = json.loads(reply.choices[0].message.content)
        assert found["a"] in (1, 2)
        assert isinstance(found["b"], bool)
    lark = client.completions.create(
        model="tiny", prompt="x", max_tokens=50, extra_body={"grammar": 'start: "ab" | "cd" start'}
    )
    assert lark.choices[0].text.endswith("ab")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"regex": "("})
    assert caught.value.param == "regex"
    assert "unclosed group" in caught.value.message


def test_scores(chat_server, loaded):
    model, tokenizer = loaded
    choices = [" mat", " dog by the fire", "s", "日"]
    expected = score_choices(model, tokenizer, "The cat sat on the", choices)
    body = {"prompt": "The cat sat on the", "continuations": choices, "log_probs": True}
    answer = chat_server.client.post("/v1/score", json=body).json()
    for one, wanted in zip(answer["data"], expected, strict=True):
        assert one["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-3)
        assert one["log_probs"] == pytest.approx(wanted.log_probs.tolist(), abs=1e-3)
        assert one["tokens"] == len(one["log_probs"])
        assert one["greedy"] == wanted.greedy
        assert math.fsum(one["log_probs"]) == pytest.approx(one["log_prob"])
    ids = tokenizer.encode("The cat", add_special_tokens=False)
    by_ids = chat_server.client.post("/v1/score", json={"prompt": ids, "continuations": [[5, 6], " sat"]}).json()
    assert by_ids["data"][0]["tokens"] == 2
    assert "log_probs" not in by_ids["data"][0]


def test_tokens(chat_server, loaded):
    _, tokenizer = loaded
    text = "The cat — naïve 日本 🙂"
    found = chat_server.client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert chat_server.client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = chat_server.client.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert chat_server.client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert chat_server.client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"tokens": [1]}):
        assert chat_server.client.post("/tokenize", json=body).status_code == 400
    assert chat_server.client.post("/detokenize", json={"tokens": [304]}).status_code == 400


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=5)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[])
    assert caught.value.param == "messages"


def test_without_a_chat_template(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.code == "chat_template_missing"
    assert "/v1/completions" in caught.value.message


def test_many_at_once_with_the_asynchronous_client(chat_server):
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:

            async def whole(seed: int) -> str:
                asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": seed}
                return (await client.chat.completions.create(**asked)).choices[0].message.content or ""

            async def streamed(seed: int) -> str:
                asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": seed, "logprobs": True}
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([event.choices[0].delta.content or "" async for event in stream])

            wholes = await asyncio.gather(*(whole(seed) for seed in range(8)))
            streams = await asyncio.gather(*(streamed(seed) for seed in range(8)))
            assert wholes == streams

    asyncio.run(run())
