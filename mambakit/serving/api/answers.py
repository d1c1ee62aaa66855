"""The JSON of a response, whole or as events, and its token usage."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Usage:
    """Tokens of one request. Each prompt counts once, however many texts follow it.

    Attributes:
        prompts: tokens of each prompt.
        copies: n, the texts of each prompt.
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
class Answer:
    """The JSON of one response."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "choices": choices,
        }  # fmt: skip

    def whole(self, texts: Iterable[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """All (text, finish_reason), in order."""
        choices = [_choice(index, text, reason) for index, (text, reason) in enumerate(texts)]
        return self._body(choices) | {"usage": usage.body}

    def event(self, index: int, text: str, finish_reason: str, usage: bool) -> bytes:
        """``usage``: whether the stream ends with a usage event; the other events then have ``"usage": null``."""
        return event(self._body([_choice(index, text, finish_reason)]) | ({"usage": None} if usage else {}))

    def usage_event(self, usage: Usage) -> bytes:
        return event(self._body([]) | {"usage": usage.body})


def _choice(index: int, text: str, finish_reason: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason or None}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
