"""Log-probabilities in answers, as the completions API and the chat API have them. No number is infinite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambakit.generation.token_texts import TokenTexts
from mambakit.serving.api.shapes import INTEGER, NUMBER, STRING, array, nullable, record
from mambakit.serving.messages import Scored

LEAST = -9999.0  # in place of minus infinity


def completion_log_probs(
    texts: TokenTexts,
    scored: Sequence[Scored],
    before: int = 0,
    prompt: Sequence[Scored] = (),
    offsets: Sequence[int] = (),
) -> dict[str, Any]:
    """The ``logprobs`` of a choice of the completions API.

    Args:
        scored: tokens of the text.
        before: characters that stand before the text.
        prompt: tokens of the prompt, where it is given back; ``offsets`` are the characters before each.
    """
    entries = [*zip(prompt, offsets, strict=True), *((one, before + one.offset) for one in scored)]
    return {
        "tokens": [texts.text(one.token) for one, _ in entries],
        "token_logprobs": [_finite(one.log_prob) for one, _ in entries],
        "top_logprobs": [None if one.log_prob is None else _top(texts, one) for one, _ in entries],
        "text_offset": [offset for _, offset in entries],
    }


def _top(texts: TokenTexts, one: Scored) -> dict[str, float | None]:
    """The likeliest tokens, and the text's own."""
    found = {texts.text(token): _finite(p) for token, p in one.top}
    return found | {texts.text(one.token): _finite(one.log_prob)}


def chat_log_probs(texts: TokenTexts, scored: Sequence[Scored]) -> dict[str, Any]:
    """The ``logprobs`` of a choice of the chat API."""

    def entry(token: int, p: float | None) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": _finite(p), "bytes": [*texts.bytes(token)]}

    return {
        "content": [
            entry(one.token, one.log_prob) | {"top_logprobs": [entry(token, p) for token, p in one.top]}
            for one in scored
        ],
        "refusal": None,
    }


def _finite(p: float | None) -> float | None:
    return None if p is None else max(LEAST, p)


COMPLETION_LOG_PROBS = nullable(
    record(
        {
            "tokens": array(STRING),
            "token_logprobs": array(nullable(NUMBER)),
            "top_logprobs": array(nullable({"type": "object", "additionalProperties": NUMBER})),
            "text_offset": array(INTEGER),
        }
    )
)
_ENTRY = {"token": STRING, "logprob": NUMBER, "bytes": nullable(array(INTEGER))}
CHAT_LOG_PROBS = nullable(
    record(
        {
            "content": nullable(array(record({**_ENTRY, "top_logprobs": array(record(_ENTRY))}))),
            "refusal": nullable(STRING),
        }
    )
)
