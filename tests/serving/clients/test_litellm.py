"""LiteLLM's OpenAI provider: completion, chat, streams, tools, an error, asynchronous."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.serving.clients.test_openai import HELLO, TOOLS

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import would ask the network for prices
litellm = pytest.importorskip("litellm")


@pytest.fixture
def asked(chat_server):
    return {
        "model": "openai/tiny", "api_base": f"{chat_server.url}/v1", "api_key": "none", "max_retries": 0,
        "max_tokens": 10, "temperature": 0,
    }  # fmt: skip


@pytest.fixture
def chat(asked):
    return asked | {"messages": HELLO}


def told(chat_server, path: str, **body) -> dict:
    """The answer without a client."""
    answer = chat_server.client.post(path, json=body | {"max_tokens": 10, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion_and_its_stream(asked, chat_server):
    expected = told(chat_server, "/v1/completions", prompt="The cat")
    completion = asked | {"model": "text-completion-openai/tiny", "prompt": "The cat"}
    whole = litellm.text_completion(**completion)
    assert whole.choices[0].text == expected["choices"][0]["text"] != ""
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == expected["usage"]["completion_tokens"] == 10
    pieces = list(litellm.text_completion(**completion, stream=True))
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text


def test_a_chat_and_its_stream(chat, chat_server):
    expected = told(chat_server, "/v1/chat/completions", messages=HELLO)
    whole = litellm.completion(**chat)
    assert whole.choices[0].message.content == expected["choices"][0]["message"]["content"] != ""
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    events = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta.content or "" for event in events for choice in event.choices]  # usage comes without one
    assert "".join(deltas) == whole.choices[0].message.content
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    built = litellm.stream_chunk_builder(events, messages=HELLO)
    assert built.choices[0].message.content == whole.choices[0].message.content


def test_log_probabilities_and_tools(chat):
    found = litellm.completion(**chat, logprobs=True, top_logprobs=2).choices[0]
    assert [len(one.top_logprobs) for one in found.logprobs.content] == [2] * 10
    call = '<tool_call>{"name": "look", "arguments": {"at": "this"}}</tool_call>'
    regex = call.replace("{", "\\{").replace("}", "\\}")
    made = litellm.completion(**chat | {"max_tokens": 150}, tools=TOOLS, extra_body={"regex": regex}).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.tool_calls[0].function.name == "look"


def test_errors_are_its_exceptions(chat, asked):
    with pytest.raises(litellm.BadRequestError) as caught:
        litellm.completion(**chat | {"temperature": 5})
    assert "temperature" in str(caught.value)
    assert caught.value.status_code == 400
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**chat | {"model": "openai/other"})
    with pytest.raises(litellm.BadRequestError):
        litellm.text_completion(**asked | {"model": "text-completion-openai/tiny", "prompt": "x", "temperature": 5})


def test_many_at_once_asynchronously(chat):
    async def run() -> None:
        async def streamed(seed: int) -> str:
            stream = await litellm.acompletion(**chat | {"temperature": 1, "seed": seed}, stream=True)
            return "".join([event.choices[0].delta.content or "" async for event in stream])

        async def whole(seed: int) -> str:
            reply = await litellm.acompletion(**chat | {"temperature": 1, "seed": seed})
            return reply.choices[0].message.content or ""

        wholes = await asyncio.gather(*(whole(seed) for seed in range(6)))
        assert wholes == await asyncio.gather(*(streamed(seed) for seed in range(6)))
        assert len(set(wholes)) > 1
        with pytest.raises(litellm.BadRequestError):
            await litellm.acompletion(**chat | {"temperature": 5})

    asyncio.run(run())
