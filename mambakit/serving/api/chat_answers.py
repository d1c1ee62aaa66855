"""The JSON of replies in a chat, whole or as events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.answers import Choice, Head, Usage, event
from mambakit.serving.api.log_probs import chat_log_probs
from mambakit.serving.api.reply import Call, ReplyForm, ReplyReader


class ChatAnswer:
    """An answer of the chat API.

    Args:
        form: how replies are written.
        texts: spellings of tokens, where log-probabilities are shown.
    """

    def __init__(
        self, model: str, form: ReplyForm, stream: bool, texts: TokenTexts | None = None, usage: bool = False,
        metadata: dict[str, str] | None = None,
    ):  # fmt: skip
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self._head = Head(model, kind, f"chatcmpl-{uuid.uuid4().hex}", usage, metadata)
        self._form, self._texts = form, texts
        self._replies: dict[int, ReplyReader] = {}
        self._calls: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return self._head.body([self._whole(one) for one in choices]) | {"usage": usage.body}

    def begin(self, choice: Choice) -> bytes:
        return self._event(choice.index, {"role": "assistant", "content": ""})

    def gain(self, choice: Choice) -> bytes:
        reply = self._replies.setdefault(choice.index, ReplyReader(self._form))
        said = reply.push(choice.text)
        if choice.finish_reason:
            said = said.plus(reply.end())
        if said.content and not (choice.finish_reason or choice.log_probs or said.reasoning or said.calls):
            return self._head.text_event(choice.index, said.content, lambda: _choice(choice.index, {"content": ""}))
        deltas: list[dict[str, Any]] = []
        if said.reasoning:
            deltas.append({"reasoning_content": said.reasoning})
        if said.content or (choice.log_probs and self._texts is not None and not said.reasoning and not said.calls):
            deltas.append({"content": said.content})
        for call in said.calls:
            number = self._calls[choice.index] = self._calls.get(choice.index, -1) + 1
            deltas.append({"tool_calls": [{"index": number, **_call(call)}]})
        events: list[bytes] = []
        for delta in deltas:  # log-probabilities come with the first
            events.append(self._event(choice.index, delta, choice.log_probs if not events else ()))
        if choice.finish_reason:
            events.append(self._event(choice.index, {}, (), _reason(choice.finish_reason, reply), choice.more))
        return b"".join(events)

    def usage_event(self, usage: Usage) -> bytes:
        return event(self._head.body([]) | {"usage": usage.body})

    def _whole(self, one: Choice) -> dict[str, Any]:
        reply = ReplyReader(self._form)
        said = reply.push(one.text).plus(reply.end())
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
            message["content"] = said.content or None
        return {
            "index": one.index, "message": message, "logprobs": self._log_probs(one.log_probs),
            "finish_reason": _reason(one.finish_reason, reply),
        } | one.more  # fmt: skip

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        scored: Sequence[Any] = (),
        reason: str = "",
        more: dict[str, Any] | None = None,
    ) -> bytes:
        log_probs = self._log_probs(scored) if scored else None
        return self._head.event(_choice(index, delta, log_probs, reason) | (more or {}))

    def _log_probs(self, scored: Sequence[Any]) -> dict[str, Any] | None:
        return None if self._texts is None else chat_log_probs(self._texts, scored)


def _choice(index: int, delta: dict[str, Any], log_probs: Any = None, reason: str = "") -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason or None}


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }  # fmt: skip


def _reason(reason: str, reply: ReplyReader) -> str:
    return "tool_calls" if reason == "stop" and reply.called else reason
