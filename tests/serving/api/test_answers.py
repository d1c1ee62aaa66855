"""Events with nothing but text are written from a template: they are those of the general way, byte for byte."""

from __future__ import annotations

import json

import pytest

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.answers import Choice, CompletionAnswer, event
from mambakit.serving.api.chat_answers import ChatAnswer
from mambakit.serving.api.reply import ReplyForm
from tests.serving.api_server import byte_tokenizer

TEXTS = ["x", '""', '","choices":[{"text":""', "\\", "é\n\u2028😀", "\ud800", "\x00\x1f</script>"]
MODELS = ["m", '","choices":[', '""']
METADATA = [None, {}, {'","choices":[': '""'}]


@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_events_of_completions(model, usage, metadata):
    for spellings in (None, TokenTexts(byte_tokenizer())):
        answer = CompletionAnswer(model, ["", "echoed"], spellings, usage, metadata)
        none = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for index in (1, 0, 1):
            for text in TEXTS:
                choice = {
                    "index": index, "text": text, "logprobs": none if spellings else None, "finish_reason": None,
                }  # fmt: skip
                whole = answer._head.body([choice]) | ({"usage": None} if usage else {})
                assert answer.gain(Choice(index, text)) == event(whole)
                last = whole | {"choices": [choice | {"finish_reason": "stop"}]}
                assert answer.gain(Choice(index, text, "stop")) == event(last)
            assert answer.gain(Choice(index)) == b""


@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_events_of_chats(model, usage, metadata):
    answer = ChatAnswer(model, ReplyForm(), True, None, usage, metadata)
    for index in (1, 0, 1):
        for text in TEXTS:
            choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            whole = answer._head.body([choice]) | ({"usage": None} if usage else {})
            assert answer.gain(Choice(index, text)) == event(whole)
        assert answer.gain(Choice(index)) == b""
    ends = answer.gain(Choice(0, "last", "stop")).split(b"\n\n")
    deltas = [json.loads(one.removeprefix(b"data: "))["choices"][0] for one in ends[:-1]]
    assert [one["delta"] for one in deltas] == [{"content": "last"}, {}]
    assert [one["finish_reason"] for one in deltas] == [None, "stop"]


def test_a_thought_and_what_is_said_in_one_piece():
    """Nothing of what comes with a text is left out."""
    answer = ChatAnswer("m", ReplyForm(thinks=True, begins_thinking=True), True)
    answer.gain(Choice(0, "let me "))
    events = answer.gain(Choice(0, "see\n</think>\n\nYes, it")).split(b"\n\n")[:-1]
    deltas = [json.loads(one.removeprefix(b"data: "))["choices"][0]["delta"] for one in events]
    assert [list(one) for one in deltas] == [["reasoning_content"], ["content"]]
    assert "see" in deltas[0]["reasoning_content"]
    assert deltas[1]["content"].startswith("Yes")
