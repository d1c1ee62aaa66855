"""What a reply says, thinks and calls, however its text is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from mambakit.serving.api.reply import Call, ReplyForm, ReplyReader, Said

BOTH = ReplyForm(thinks=True, calls=True)
CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'


def read(form: ReplyForm, pieces: list[str]) -> tuple[Said, bool]:
    reader, said = ReplyReader(form), Said()
    for piece in pieces:
        said = said.plus(reader.push(piece))
    return said.plus(reader.end()), reader.called


CASES = [
    (
        ReplyForm(),
        "a <think>b</think> <tool_call>c</tool_call> ",
        "a <think>b</think> <tool_call>c</tool_call> ",
        "",
        0,
    ),
    (BOTH, "Hello there.", "Hello there.", "", 0),
    (BOTH, "<think>\nLet me see.\n</think>\n\nHello.", "Hello.", "Let me see.", 0),
    (BOTH, f"One.\n<tool_call>\n{CALL}\n</tool_call>", "One.", "", 1),
    (BOTH, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", "", "", 2),
    (BOTH, "a < b and <b> and <thin", "a < b and <b> and <thin", "", 0),
    (BOTH, "<tool_call>no JSON</tool_call>x", "<tool_call>no JSON</tool_call>x", "", 0),
    (BOTH, "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", "", 0),
    (BOTH, '<tool_call>{"name": "cut', '<tool_call>{"name": "cut', "", 0),
    (BOTH, "<think>cut off", "", "cut off", 0),
    (ReplyForm(thinks=True, begins_thinking=True), "hm\n</think>\nYes", "Yes", "hm", 0),
    (
        ReplyForm(thinks=True),
        f"<think>a</think><tool_call>{CALL}</tool_call>",
        f"<tool_call>{CALL}</tool_call>",
        "a",
        0,
    ),
]


@pytest.mark.parametrize(("form", "text", "content", "reasoning", "calls"), CASES)
def test_replies(form, text, content, reasoning, calls):
    expected = Said(content, reasoning, (Call("add", json.dumps({"a": 1, "b": "<x>"})),) * calls)
    assert read(form, [text]) == (expected, calls > 0)
    rng = random.Random(0)
    for _ in range(30):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(form, pieces)[0] == expected, pieces
    assert read(form, list(text))[0] == expected


def test_nothing_is_held_back_without_need():
    reader = ReplyReader(BOTH)
    assert reader.push("Hello, wor").content == "Hello, wor"
    assert reader.push("ld <").content == "ld"
    assert reader.push("3").content == " <3"


def test_arguments_as_text_and_under_their_other_name():
    said, _ = read(BOTH, ['<tool_call>{"name": "f", "parameters": {"x": "ü"}}</tool_call>'])
    assert said.calls == (Call("f", '{"x": "ü"}'),)
    said, _ = read(BOTH, ['<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'])
    assert said.calls == (Call("f", "{}"),)


@pytest.mark.parametrize(
    "call",
    [
        '"name": "f", "arguments": {"a": NaN}',
        '"name": "f", "arguments": -Infinity',
        '"name": "f", "arguments": [1e999]',
        '"name": "\\ud800"',
        '"name": "f", "arguments": "\\udfff"',
    ],
)
def test_what_json_or_utf8_cannot_say_stays_text(call):
    text = f"<tool_call>{{{call}}}</tool_call>"
    assert read(BOTH, [text]) == (Said(content=text), False)


def test_half_a_surrogate_pair_in_arguments_stays_an_escape():
    said, _ = read(BOTH, ['<tool_call>{"name": "f", "arguments": {"x": "\\ud800", "y": "\\ud83d\\ude00"}}</tool_call>'])
    (call,) = said.calls
    assert call.arguments.encode().isascii()
    assert json.loads(call.arguments) == {"x": "\ud800", "y": "\U0001f600"}
