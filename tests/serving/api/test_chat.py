"""Chats: what a request may say, and the prompt that the model's template makes of it."""

from __future__ import annotations

import json
import pickle

import pytest

from mambakit.serving.api.chat import parse, prepare
from mambakit.serving.api.declarations import Limits
from mambakit.serving.api.prompts import Codec
from mambakit.serving.api.reply import ReplyForm
from mambakit.serving.api.templates import ChatTemplate
from mambakit.serving.errors import ApiError
from tests.serving.api_server import byte_tokenizer
from tests.serving.chat_template import TEMPLATE

LIMITS = Limits(model="m", vocab_size=300, max_new_tokens=100, max_prompt_tokens=5, most_texts=10)
FULL = ChatTemplate(TEMPLATE, special_tokens={"bos_token": "<s>"})
PLAIN = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
STRICT = ChatTemplate(
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users, not ' + m.role) }}{% endif %}"
    "{{ m.content.upper() }}{% endfor %}"
)
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def prompt(template: ChatTemplate = FULL, **body) -> str:
    (text,) = parse({"messages": [USER]} | body, template, LIMITS)[0].prompts
    return text


def refused(template: ChatTemplate | None = FULL, **body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse({"messages": [USER]} | body, template, LIMITS)
    return caught.value


def test_roles_and_the_beginning_of_the_reply():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        USER,
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "refusal": None},
        {"role": "user", "content": "Again", "name": "Ada"},
    ]
    text = "<s>[system]Be brief.[user]Hi[assistant]<think>hm</think>Yes.[user]Again"
    assert prompt(messages=messages) == text + "[assistant]"
    assert prompt(messages=messages, add_generation_prompt=False) == text
    going_on = [USER, {"role": "assistant", "content": "Well"}]
    assert prompt(messages=going_on, continue_final_message=True) == "<s>[user]Hi[assistant]Well"


def test_tools():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    made = prompt(messages=messages, tools=[TOOL])
    assert made.startswith('<s>[tools]{"type": "function", "function": {"name": "add", ')
    assert '[assistant]<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>[tool]2[assistant]' in made
    for arguments, shown in (("", "{}"), ("{bad", '"{bad"'), ("[1]", '"[1]"')):
        called = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        assert prompt(messages=called).endswith(f'"arguments": {shown}}}</tool_call>[assistant]')
    assert "[tools]" not in prompt(messages=messages, tools=[TOOL], tool_choice="none")
    assert "[tools]" not in prompt(messages=messages, tools=[])
    two = ChatTemplate(PLAIN.text, with_tools=TEMPLATE)
    assert prompt(two, tools=[TOOL]).startswith("[tools]")
    assert prompt(two) == "user: Hi\n"


def test_the_form_of_replies():
    def form(template, **body):
        return parse({"messages": [USER]} | body, template, LIMITS)[1]

    assert form(FULL) == ReplyForm(thinks=True)
    assert form(FULL, tools=[TOOL]) == ReplyForm(thinks=True, calls=True)
    assert form(PLAIN) == ReplyForm()
    assert form(FULL, chat_template_kwargs={"thinking": True}) == ReplyForm(thinks=True, begins_thinking=True)


def test_variables():
    template = ChatTemplate(PLAIN.text + "{{ reasoning_effort }} {{ mood }}")
    made = prompt(template, reasoning_effort="low", chat_template_kwargs={"mood": "good"})
    assert made == "user: Hi\nlow good"


def test_limits_of_tokens_and_log_probabilities():
    def asked(**body):
        return parse({"messages": [USER]} | body, FULL, LIMITS)[0]

    assert asked().max_tokens == LIMITS.max_new_tokens
    assert asked(max_tokens=3).max_tokens == asked(max_completion_tokens=3).max_tokens == 3
    assert asked(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert asked().options.log_probs is None
    assert asked(logprobs=True).options.log_probs == 0
    assert asked(logprobs=True, top_logprobs=4).options.log_probs == 4


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": None}, "messages", "there is no messages"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": ["Hi"]}, "messages", 'messages[0] is "Hi"; it must be an object of role, content'),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "'system' or 'developer'"),
        ({"messages": [{"content": ""}]}, "messages[0].role", "there is no messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "has no content"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content", "a string or a list of text parts"),
        ({"messages": [USER | {"contents": 5}]}, "messages[0].contents", "did you mean 'messages[0].content'"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "only parts of type text are served",
        ),
        ({"messages": [USER | {"content": "\ud800"}]}, "messages[0].content", "half of a surrogate pair"),
        ({"messages": [USER | {"tool_calls": []}]}, "messages[0].tool_calls", "only an assistant's message has calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "there is no messages[0].tool_calls[0].function; give its name and arguments",
        ),
        ({"prompt": "x"}, "prompt", "there is no field"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "give one of them"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "at most 100"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"top_logprobs": 1}, "top_logprobs", "add logprobs: true"),
        ({"logprobs": 1}, "logprobs", "it must be true or false"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "there is no tools[0].function"),
        ({"tools": [{"type": "x"}]}, "tools[0].type", "it must be 'function'"),
        ({"tool_choice": "required"}, "tool_choice", "auto and none are served"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "auto and none are served"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "names messages"),
        ({"chat_template_kwargs": {"conversations": []}}, "chat_template_kwargs", "names conversations"),
        ({"continue_final_message": True}, "continue_final_message", "an assistant's last message"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "has no reasoning_effort"),
        ({"functions": []}, "functions", "use tools"),
        ({"store": True}, "store", "nothing is stored"),
        ({"verbosity": "low"}, "verbosity", "ask for it in a message"),
        ({"web_search_options": {}}, "web_search_options", "nothing is searched"),
        ({"prompt_cache_retention": "forever"}, "prompt_cache_retention", "or '24h'"),
        ({"model": "other"}, "model", "'m' alone"),
    ],
)
def test_refusals(body, param, says):
    error = refused(**body)
    assert error.param == param
    assert says in error.message
    assert error.status == (404 if param == "model" else 400)


def test_without_a_template_or_with_one_that_refuses():
    error = refused(None)
    assert (error.status, error.code) == (400, "chat_template_missing")
    assert "/v1/completions" in error.message
    error = refused(STRICT, messages=[USER, {"role": "assistant", "content": "x"}])
    assert "only users, not assistant" in error.message
    assert "has no tools" in refused(PLAIN, tools=[TOOL]).message
    for broken in ("{{ 1 / 0 }}", "{{ messages.x.y }}", "{{ ''.__class__.__mro__ }}"):
        assert refused(ChatTemplate(broken)).status == 400


def test_values_that_ask_for_nothing_are_taken():
    body = {"store": False, "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "tools": None}
    assert prompt(**body, user="x", metadata={"a": "b"}, functions=None) == prompt()
    hints = {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h", "verbosity": "medium"}
    assert prompt(**hints) == prompt(), "what the openai client may send with any chat"


def test_a_template_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert json.loads(json.dumps(FULL.text)) == TEMPLATE


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"const": "\ud800"}}}]},
        {"tools": [TOOL], "messages": [USER, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_that_the_template_makes_is_refused(body):
    codec = Codec(byte_tokenizer())
    codec.template = FULL
    with pytest.raises(ApiError, match="half of a surrogate pair") as caught:
        prepare(json.dumps({"messages": [USER]} | body).encode(), codec, LIMITS)
    assert (caught.value.status, caught.value.param) == (400, "messages")
