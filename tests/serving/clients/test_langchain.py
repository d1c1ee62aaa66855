"""LangChain's OpenAI classes: completion, chat, streams, tools, a schema, an error, asynchronous."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.serving.clients.test_openai import HELLO, TOOLS

langchain_openai = pytest.importorskip("langchain_openai")

MESSAGES = [(one["role"], one["content"]) for one in HELLO]


@pytest.fixture
def options(chat_server):
    return {
        "model": "tiny", "base_url": f"{chat_server.url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0,
        "max_tokens": 10,
    }  # fmt: skip


def told(chat_server, path: str, **body) -> dict:
    """The answer without a client."""
    answer = chat_server.client.post(path, json=body | {"max_tokens": 10, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion_and_its_stream(options, chat_server):
    expected = told(chat_server, "/v1/completions", prompt="The cat")["choices"][0]["text"]
    model = langchain_openai.OpenAI(**options)
    assert model.invoke("The cat") == expected != ""
    assert "".join(model.stream("The cat")) == expected
    assert model.batch(["The cat", "The cat"]) == [expected] * 2


def test_a_chat_and_its_stream(options, chat_server):
    expected = told(chat_server, "/v1/chat/completions", messages=HELLO)
    model = langchain_openai.ChatOpenAI(**options)
    whole = model.invoke(MESSAGES)
    assert whole.content == expected["choices"][0]["message"]["content"] != ""
    assert whole.usage_metadata["total_tokens"] == expected["usage"]["total_tokens"]
    assert whole.response_metadata["finish_reason"] == "length"
    pieces = list(model.stream(MESSAGES, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == whole.content
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    assert joined.usage_metadata == whole.usage_metadata


def test_tools_and_a_schema(options):
    call = '<tool_call>{"name": "look", "arguments": {"at": "this"}}</tool_call>'
    model = langchain_openai.ChatOpenAI(**options | {"max_tokens": 150})
    regex = call.replace("{", "\\{").replace("}", "\\}")
    (made,) = model.bind_tools(TOOLS).invoke(MESSAGES, extra_body={"regex": regex}).tool_calls
    assert (made["name"], made["args"]) == ("look", {"at": "this"})
    schema = {
        "title": "answer", "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    assert model.with_structured_output(schema, method="json_schema").invoke(MESSAGES)["a"] in (1, 2)


def test_errors_are_the_clients_exceptions(options):
    for model in (langchain_openai.ChatOpenAI, langchain_openai.OpenAI):
        with pytest.raises(openai.BadRequestError) as caught:
            model(**options | {"temperature": 5}).invoke("x")
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            model(**options | {"model": "gpt-5"}).invoke("x")


def test_many_at_once_asynchronously(options):
    async def run() -> None:
        def model(seed: int):
            return langchain_openai.ChatOpenAI(**options | {"temperature": 1, "seed": seed})

        async def whole(seed: int) -> str:
            return (await model(seed).ainvoke(MESSAGES)).content

        async def streamed(seed: int) -> str:
            return "".join([piece.content async for piece in model(seed).astream(MESSAGES)])

        wholes = await asyncio.gather(*(whole(seed) for seed in range(6)))
        assert wholes == await asyncio.gather(*(streamed(seed) for seed in range(6)))
        assert len(set(wholes)) > 1

    asyncio.run(run())
