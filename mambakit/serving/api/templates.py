"""The tokenizer's chat template: messages to the text of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mambakit.quoting import cut
from mambakit.serving.api.declarations import wrong
from mambakit.serving.errors import ApiError

_NAMES = ("default", "tool_use")  # where a tokenizer has several templates


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. It can be pickled.

    Attributes:
        text: Jinja.
        with_tools: another one for requests with tools; None: the same.
        special_tokens: what the template may name: bos_token, ...
    """

    text: str
    with_tools: str | None = None
    special_tokens: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(tokenizer: Any) -> ChatTemplate | None:
        """None where the tokenizer has none."""
        found = getattr(tokenizer, "chat_template", None)
        if not found:
            return None
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if isinstance(found, str):
            return ChatTemplate(found, special_tokens=special)
        default, with_tools = (found.get(name) for name in _NAMES)
        text = default or with_tools
        return None if text is None else ChatTemplate(text, with_tools, special)

    def knows(self, word: str) -> bool:
        """Whether the templates say ``word`` anywhere: a name of a variable, a role, a marker."""
        return word in self.text or word in (self.with_tools or "")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        begin_answer: bool,
        continue_answer: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt's text.

        Args:
            begin_answer: whether it ends with what stands before an answer.
            continue_answer: whether it ends inside the last message, which the answer continues.
            variables: further ones of the template.

        Raises:
            ApiError: the template refuses these messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self.text if tools is None or self.with_tools is None else self.with_tools
        try:
            rendered, _ = render_jinja_template(
                [[dict(message) for message in messages]], tools=None if tools is None else [*map(dict, tools)],
                chat_template=text, add_generation_prompt=begin_answer, continue_final_message=continue_answer,
                **{**variables, **self.special_tokens},
            )  # fmt: skip
        except Exception as error:
            # A template raises for roles and orders that its model does not know, and is a program of its own, which
            # may fail in any way on messages that its author did not think of.
            raise wrong(
                "messages", f"the model's chat template refuses these messages: {cut(str(error), 300)}"
            ) from error
        found: str = rendered[0]
        return found


# What stands for a conversation that a state has read: a template's text after the reply does not depend on it.
_QUESTION, _REPLY = "question", "\u27e6reply\u27e7"


def after_reply(render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of new ``messages`` after a reply that was read already, from the end of the reply's own text on.

    It takes as long as the new messages, whatever the conversation has been.

    Raises:
        ApiError: the template refuses them, or does not show a reply as it is.
    """
    before = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}]
    shown = render([*before, *messages])
    if shown.count(_REPLY) != 1:
        raise wrong(
            "state", "the model's chat template does not show earlier replies as they are, so that messages cannot go "
            "on from a state; send all messages, or use /v1/completions with the text that comes next",
        )  # fmt: skip
    return shown.partition(_REPLY)[2]


def missing() -> ApiError:
    """The refusal of a chat where there is no template."""
    return ApiError(
        400,
        "the model has no chat template, so that messages cannot become a prompt; send a prompt to /v1/completions, or "
        "serve a model whose tokenizer has one (or --chat-template FILE)",
        param="messages",
        code="chat_template_missing",
    )
