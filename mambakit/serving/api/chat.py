"""`POST /v1/chat/completions`: its fields, and a body to a valid request with its messages as a prompt."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mambakit.decoding.parameters import Number
from mambakit.quoting import quoted
from mambakit.serving.api.asked import Asked, asked, parse_body
from mambakit.serving.api.chat_messages import (
    MESSAGE,
    MOST_MESSAGES,
    MOST_TOOLS,
    TOOL,
    for_template,
    items,
    message_schema,
    tools_for_template,
)
from mambakit.serving.api.checks import check_tokens
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.fields import GENERATION, MOST_ALTERNATIVES, max_tokens, require_one_limit
from mambakit.serving.api.prompts import Codec, Prepared, depth_is_bounded
from mambakit.serving.api.reply import ReplyForm
from mambakit.serving.api.shapes import ANY_OBJECT
from mambakit.serving.api.templates import ChatTemplate, after_reply, missing
from mambakit.serving.api.values import choice, flag, number, text, unserved

# What the renderer itself takes.
_RESERVED = {
    "messages", "conversations", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "return_assistant_tokens_mask",
}  # fmt: skip


def _variables(name: str, value: Any, _: Limits) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{name} is {quoted(value)}; it must be an object of the template's variables")
    if taken := _RESERVED & set(value or {}):
        raise ValueError(f"{name} names {sorted(taken)[0]}, which other fields say; leave it out")
    return value or {}


def _tool_choice(name: str, value: Any, _: Limits) -> str:
    if value not in (None, "auto", "none"):
        message = (
            f"{name} is {quoted(value)}; auto and none are served: the model itself chooses whether to call a tool"
        )
        raise wrong(name, message, "unsupported_value")
    return value or "auto"


PROMPT: Fields = {
    "messages": items(
        MESSAGE,
        MOST_MESSAGES,
        "give the chat so far, oldest first",
        required=True,
        what="messages",
        schema_of_one=message_schema,
    ),
    "tools": items(TOOL, MOST_TOOLS, "Functions that the model may call, where its template has tools.", what="tools"),
    "tool_choice": Field(_tool_choice, {"type": "string", "enum": ["auto", "none"]}, "none: no tool is shown."),
    "reasoning_effort": choice(
        ("none", "minimal", "low", "medium", "high", "xhigh"), "The template's variable of this name, where it has one."
    ),
    "chat_template_kwargs": Field(_variables, ANY_OBJECT, "Extension: further variables of the template."),
    "add_generation_prompt": flag("Extension: whether the prompt ends with the beginning of a reply.", default=True),
    "continue_final_message": flag("Extension: whether the reply continues the last message."),
}
"""The fields that become the prompt."""

CHAT: Fields = {
    **GENERATION,
    **PROMPT,
    "max_tokens": max_tokens(1, None, "New tokens of each reply, at most; the server's limit is the default."),
    "max_completion_tokens": max_tokens(1, None, "The same; max_tokens is its earlier name."),
    "logprobs": flag("Whether each token comes with its log-probability."),
    "top_logprobs": number(
        Number(None, 0, MOST_ALTERNATIVES, whole=True), "With logprobs: so many of the likeliest tokens at each place."
    ),
    "parallel_tool_calls": flag("Of no effect: the model calls as many as it does.", default=True),
    "store": unserved({"type": "boolean", "enum": [False]}, (False,), "nothing is stored: leave it out"),
    "service_tier": unserved({"type": "string", "enum": ["auto", "default"]}, ("auto", "default"), "leave it out"),
    "modalities": unserved({"const": ["text"]}, (["text"],), "only text is served"),
    "verbosity": unserved({"const": "medium"}, ("medium",), "ask for it in a message"),
    "safety_identifier": text("Of no effect."),
    "prompt_cache_key": text("Of no effect: prompts are known by what they begin with."),
    "prompt_cache_retention": choice(("in_memory", "in-memory", "24h"), "Of no effect."),
    "web_search_options": unserved({"type": "null"}, (), "nothing is searched"),
    "functions": unserved({"type": "null"}, (), "use tools"),
    "function_call": unserved({"type": "null"}, (), "use tools and tool_choice"),
    "audio": unserved({"type": "null"}, (), "only text is served"),
    "prediction": unserved({"type": "null"}, (), "leave it out"),
}


@dataclass(frozen=True)
class PreparedChat(Prepared):
    """A valid request for replies.

    Attributes:
        form: how a reply is written.
    """

    form: ReplyForm = field(default_factory=ReplyForm)


def parse(body: Mapping[str, Any], template: ChatTemplate | None, limits: Limits) -> tuple[Asked, ReplyForm]:
    """Check a request and render its prompt.

    Raises:
        ApiError: a field is unknown, not served or wrong, there is no template, or it refuses the messages.
    """
    values = read(CHAT, body, limits)
    limit, given = values["max_tokens"], values["max_completion_tokens"]
    require_one_limit(limit, given)
    top = values["top_logprobs"]
    if top is not None and not values["logprobs"]:
        raise wrong("top_logprobs", f"top_logprobs is {top} without logprobs; add logprobs: true, or leave it out")
    prompt, form = prompt_of(values, template)
    request = asked(
        values, [prompt], next((n for n in (given, limit) if n is not None), limits.max_new_tokens), limits,
        log_probs=(top or 0) if values["logprobs"] else None,
    )  # fmt: skip
    return request, form


def prompt_of(values: Mapping[str, Any], template: ChatTemplate | None) -> tuple[str, ReplyForm]:
    """The prompt of valid ``values`` of `PROMPT`, and the form of a reply.

    Raises:
        ApiError: there is no template, it has no tools or refuses the messages.
    """
    if template is None:
        raise missing()
    tools = values["tools"] if values["tools"] and values["tool_choice"] != "none" else None
    if tools is not None and not template.knows("tools"):
        raise wrong("tools", "the model's chat template has no tools; leave them out", "unsupported_parameter")
    going_on = values["continue_final_message"]
    if going_on and values["messages"][-1]["role"] != "assistant":
        raise wrong(
            "continue_final_message", "continue_final_message goes with an assistant's last message; add one, or leave "
            "it out",
        )  # fmt: skip
    variables = dict(values["chat_template_kwargs"])
    if values["reasoning_effort"] is not None:
        if not template.knows("reasoning_effort"):
            raise wrong(
                "reasoning_effort", "the model's chat template has no reasoning_effort; leave it out",
                "unsupported_parameter",
            )  # fmt: skip
        variables["reasoning_effort"] = values["reasoning_effort"]
    state = values.get("state")  # /tokenize has none
    if going_on and state:
        raise wrong("continue_final_message", "a state has no last message to go on with; leave it out")

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return template.render(
            messages,
            None if tools is None else tools_for_template(tools),
            begin_answer=values["add_generation_prompt"] and not going_on,
            continue_answer=going_on,
            variables=variables,
        )

    messages = for_template(values["messages"], template.knows("developer"))
    prompt = after_reply(render, messages) if state else render(messages)
    thinks = template.knows("<think>")
    return prompt, ReplyForm(
        thinks, tools is not None and template.knows("<tool_call>"), thinks and prompt.rstrip().endswith("<think>")
    )


def prepare(body: bytes, codec: Codec, limits: Limits) -> PreparedChat:
    """Parse, render and tokenise a body. Raises an `ApiError` for an invalid request."""
    with depth_is_bounded():
        asked, form = parse(parse_body(body), codec.template, limits)
        (prompt,) = asked.prompts
        assert isinstance(prompt, str)
        ids = codec.encode(prompt, limits, "messages")
    check_tokens(ids, limits, "messages")
    return PreparedChat(replace(asked, prompts=[]), [array("q", ids).tobytes()], [None], form)
