"""The messages and tools of a chat: their declarations, and the form in which chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.shapes import ANY_OBJECT, STRING
from mambakit.serving.api.values import check_text, choice, flag, group, object_schema, text, unserved

MOST_MESSAGES, MOST_TOOLS = 4096, 128
ROLES = ("system", "developer", "user", "assistant", "tool")


def items(
    fields: Fields,
    most: int,
    about: str,
    required: bool = False,
    what: str = "objects",
    schema_of_one: Callable[[Limits], dict[str, Any]] | None = None,
) -> Field:
    """A list of up to ``most`` objects of ``fields``; None where there is none.

    Args:
        schema_of_one: a narrower schema of an object than that of its fields.
    """

    def check(name: str, value: Any, limits: Limits) -> list[dict[str, Any]] | None:
        if value is None:
            return None
        if not isinstance(value, list):
            raise TypeError(f"{name} is {quoted(value)}; it must be a list of {what}")
        if len(value) > most:
            raise ValueError(f"{name} has {len(value):,} entries; at most {most:,} are served")
        if required and not value:
            raise ValueError(f"{name} is an empty list; give at least one")
        found = []
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise TypeError(f"{name}[{index}] is {quoted(item)}; it must be an object of {', '.join(fields)}")
            found.append(read(fields, item, limits, f"{name}[{index}]."))
        return found

    def schema(limits: Limits) -> dict[str, Any]:
        one = object_schema(fields, limits) if schema_of_one is None else schema_of_one(limits)
        found = {"type": "array", "items": one, "maxItems": most}
        return found | {"minItems": 1} if required else found

    return Field(check, schema, about, required)


def _content(name: str, value: Any, limits: Limits) -> str | None:
    """A string, or a list of text parts, which become one string."""
    if value is None or isinstance(value, str):
        return None if value is None else check_text(name, value)
    if not isinstance(value, list):
        raise TypeError(f"{name} is {quoted(value)}; it must be a string or a list of text parts")
    found = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"{name}[{index}] is {quoted(part)}; only parts of type text are served")
        found.append(read(_TEXT_PART, part, limits, f"{name}[{index}].")["text"])
    return "".join(found)


_TEXT_PART: Fields = {
    "type": choice(("text",), "The kind of the part.", required=True),
    "text": text("Its text.", required=True),
}
_FUNCTION_CALL: Fields = {
    "name": text("The function.", required=True),
    "arguments": text("Its arguments, as JSON.", required=True),
}
_TOOL_CALL: Fields = {
    "id": text("What the answer of the tool names it by."),
    "type": choice(("function",), "Its kind.", default="function"),
    "function": group(_FUNCTION_CALL, "give its name and arguments", required=True),
}
_NEVER: dict[str, Any] = {"type": "null"}
MESSAGE: Fields = {
    "role": choice(ROLES, "Who says it; developer is system where the template does not know it.", required=True),
    "content": Field(
        _content,
        lambda limits: {"anyOf": [STRING, {"type": "array", "items": object_schema(_TEXT_PART, limits)}]},
        "A string, or text parts, which are joined.",
    ),
    "name": text("Of the speaker, where the template shows it."),
    "reasoning_content": text("Of an assistant's message: what it thought, where the template shows it."),
    "tool_calls": items(_TOOL_CALL, MOST_TOOLS, "Of an assistant's message: calls that it made."),
    "tool_call_id": text("Of a tool's message: the call that it answers."),
    "refusal": unserved(_NEVER, (), "leave it out"),
    "annotations": unserved({"type": "array", "maxItems": 0}, ([],), "leave it out"),
    "audio": unserved(_NEVER, (), "only text is served"),
    "function_call": unserved(_NEVER, (), "use tool_calls"),
}


def message_schema(limits: Limits) -> dict[str, Any]:
    """A message has content; an assistant's may have calls instead."""
    said = replace(MESSAGE["content"], required=True)
    assistant = choice(("assistant",), MESSAGE["role"].about, required=True)
    others = choice([role for role in ROLES if role != "assistant"], MESSAGE["role"].about, required=True)
    calling = {**MESSAGE, "role": assistant, "tool_calls": replace(MESSAGE["tool_calls"], required=True)}
    plain = {name: field for name, field in MESSAGE.items() if name != "tool_calls"}
    variants: list[Fields] = [
        {**plain, "role": others, "content": said},
        {**MESSAGE, "role": assistant, "content": said},
        calling,
    ]
    return {"anyOf": [object_schema(fields, limits) for fields in variants]}


def _parameters(name: str, value: Any, _: Limits) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{name} is {quoted(value)}; it must be a JSON schema, as an object")
    return value


_FUNCTION: Fields = {
    "name": text("Its name.", most=64, required=True),
    "description": text("What it does."),
    "parameters": Field(_parameters, ANY_OBJECT, "JSON schema of its arguments."),
    "strict": flag("Of no effect."),
}
TOOL: Fields = {
    "type": choice(("function",), "Its kind.", required=True),
    "function": group(_FUNCTION, "give its name and parameters", required=True),
}


def for_template(messages: list[dict[str, Any]], knows_developer: bool) -> list[dict[str, Any]]:
    """Messages as chat templates read them: only what is there, arguments of calls as objects.

    Raises:
        ApiError: a message without content, or calls of somebody else than the assistant.
    """
    found = []
    for index, message in enumerate(messages):
        one = {name: value for name, value in message.items() if value is not None}
        if one["role"] == "developer" and not knows_developer:
            one["role"] = "system"
        if "content" not in one and not ("tool_calls" in one and one["role"] == "assistant"):
            raise wrong(
                f"messages[{index}].content", f"messages[{index}] has no content; give a string or text parts",
                "missing_required_parameter",
            )  # fmt: skip
        if "tool_calls" in one:
            place = f"messages[{index}].tool_calls"
            if one["role"] != "assistant":
                raise wrong(place, f"{place} are there, but only an assistant's message has calls; leave them out")
            one["tool_calls"] = [_call(call) for call in one["tool_calls"]]
        one.setdefault("content", "")
        found.append(one)
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are no JSON object, as a model may write them, stay text."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    function = {**function, "arguments": arguments if isinstance(arguments, dict) else function["arguments"]}
    return {**{name: value for name, value in call.items() if value is not None}, "function": function}


def tools_for_template(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools as chat templates read them."""
    return [
        {
            "type": "function",
            "function": {
                name: value for name, value in tool["function"].items() if value is not None and name != "strict"
            },
        }
        for tool in tools
    ]
