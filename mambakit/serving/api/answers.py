"""The JSON of answers to requests for texts, whole or as events, and token usage."""

from __future__ import annotations

import functools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.log_probs import completion_log_probs
from mambakit.serving.messages import Scored


@dataclass
class Usage:
    """Tokens of one request. Each prompt counts once, however many texts follow it.

    Attributes:
        prompts: tokens of each prompt.
        copies: the texts of each prompt.
        caching: whether there is a prefix cache.
    """

    prompts: Sequence[int]
    copies: int = 1
    caching: bool = False
    completion_tokens: int = 0
    _cached: dict[int, int] = field(default_factory=dict)

    def count(self, index: int, tokens: int, cached_tokens: int | None = None) -> None:
        """Add ``tokens`` of text ``index``; with its end come the ``cached_tokens`` of its prompt.

        The first text of a prompt puts it into the cache for the others, so the smallest number of them is reported.
        """
        self.completion_tokens += tokens
        if cached_tokens is not None:
            prompt = index // self.copies
            self._cached[prompt] = min(cached_tokens, self._cached.get(prompt, self.prompts[prompt]))

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def body(self) -> dict[str, Any]:
        prompt_tokens = self.prompt_tokens
        counts: dict[str, Any] = {
            "prompt_tokens": prompt_tokens, "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }  # fmt: skip
        if self.caching:
            counts["prompt_tokens_details"] = {"cached_tokens": sum(self._cached.values())}
        return counts


@dataclass
class Choice:
    """One text of an answer, or what it has gained.

    Attributes:
        finish_reason: "" while it continues.
        prompt: with echo and log-probabilities, those of the prompt's tokens; ``offsets`` are the characters before
            each.
        state: what it has left, where that was asked for.
    """

    index: int
    text: str = ""
    finish_reason: str = ""
    log_probs: Sequence[Scored] = ()
    prompt: Sequence[Scored] = ()
    offsets: Sequence[int] = ()
    state: dict[str, Any] | None = None

    @property
    def more(self) -> dict[str, Any]:
        """Fields that only some choices have."""
        return {} if self.state is None else {"state": self.state}


class Answer(Protocol):
    """The shape of one answer."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The response."""

    def begin(self, choice: Choice) -> bytes:
        """The first event of a text in a stream; ``b""`` for none."""

    def gain(self, choice: Choice) -> bytes:
        """The events of what a text has gained; ``b""`` for none."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, where the stream's options ask for it."""


@dataclass
class Head:
    """What every body of one answer has in common.

    Attributes:
        model: its name in the API.
        usage: whether the stream ends with a usage event; the others then have ``"usage": null``.
        metadata: of the request; None: none.
    """

    model: str
    object: str
    id: str
    usage: bool = False
    metadata: dict[str, str] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _text_events: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """By index: what stands before and after the text of an event with nothing else."""

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            "id": self.id, "object": self.object, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip
        return found if self.metadata is None else found | {"metadata": self.metadata}

    def text_event(self, index: int, text: str, choice: Callable[[], dict[str, Any]]) -> bytes:
        """The event of a choice that differs from the last one of its index in its text alone. ``choice`` gives it with
        an empty text, which is its first empty string."""
        if (around := self._text_events.get(index)) is None:
            written = _encode(choice())
            at = written.index('""')
            before, after = self._around
            around = before + written[:at].encode(), written[at + 2 :].encode() + after
            self._text_events[index] = around
        return around[0] + _encode(text).encode() + around[1]

    @functools.cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """What stands before and after an event's choices. Quotes in names are escaped: the split is at the field."""
        whole = event(self.body([]) | ({"usage": None} if self.usage else {}))
        before, field, after = whole.partition(b',"choices":[')
        return before + field, after

    def event(self, choice: dict[str, Any]) -> bytes:
        """The event of one choice."""
        before, after = self._around
        return before + _encode(choice).encode() + after


class CompletionAnswer:
    """An answer of the completions API.

    Args:
        texts: spellings of tokens, where log-probabilities are shown.
        echoed: what precedes each text with `echo`.
    """

    def __init__(
        self, model: str, echoed: Sequence[str], texts: TokenTexts | None = None, usage: bool = False,
        metadata: dict[str, str] | None = None,
    ):  # fmt: skip
        self._head = Head(model, "text_completion", f"cmpl-{uuid.uuid4().hex}", usage, metadata)
        self._echoed, self._texts = echoed, texts

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return self._head.body([self._choice(one, self._echoed[one.index] + one.text) for one in choices]) | {
            "usage": usage.body
        }

    def begin(self, choice: Choice) -> bytes:
        echoed = self._echoed[choice.index]
        return self._head.event(self._choice(choice, echoed)) if echoed else b""

    def gain(self, choice: Choice) -> bytes:
        if not (choice.finish_reason or choice.log_probs):
            return self._continued(choice.index, choice.text) if choice.text else b""
        return self._head.event(self._choice(choice, choice.text))

    def usage_event(self, usage: Usage) -> bytes:
        return event(self._head.body([]) | {"usage": usage.body})

    def _continued(self, index: int, text: str) -> bytes:
        return self._head.text_event(index, text, lambda: self._choice(Choice(index), ""))

    def _choice(self, one: Choice, text: str) -> dict[str, Any]:
        log_probs = None
        if self._texts is not None:
            before = len(self._echoed[one.index])
            log_probs = completion_log_probs(self._texts, one.log_probs, before, one.prompt, one.offsets)
        found = {"index": one.index, "text": text, "logprobs": log_probs, "finish_reason": one.finish_reason or None}
        return found | one.more


_encode = json.JSONEncoder(separators=(",", ":")).encode


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
