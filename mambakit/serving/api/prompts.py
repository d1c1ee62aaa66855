"""Prompts as token ids: the tokenizer's encoder, and a valid request with its prompts encoded."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mambakit.generation.start_token import find_start_token
from mambakit.serving.api.asked import Asked
from mambakit.serving.api.declarations import Limits
from mambakit.serving.api.templates import ChatTemplate
from mambakit.serving.api.values import require_unicode
from mambakit.serving.errors import ApiError

# No token is longer than the longest of the vocabulary, for which at least this many characters are assumed. A longer
# text than that allows is refused before it is tokenised.
_LEAST_WIDTH = 16
# Characters of prompts in one answer, with `echo`: an answer is written as JSON on the event loop.
MOST_ECHO = 1 << 20
# Log-probabilities of prompts in one answer, alternatives included.
MOST_SCORED = 1 << 18


class Codec:
    """The tokenizer's encoder and its chat template. It can be pickled, and called from several threads at once.

    Attributes:
        template: None where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any):
        self._start = find_start_token(tokenizer)
        self.template = ChatTemplate.of(tokenizer)
        self._width = max(_LEAST_WIDTH, max(map(len, tokenizer.get_vocab()), default=0))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            # Written in Python: one call at a time.
            self._encode = functools.partial(_encode_alone, tokenizer)
        else:
            backend = type(backend).from_str(backend.to_str())  # a copy, whose settings no one else changes
            backend.no_truncation()
            backend.no_padding()
            self._encode = functools.partial(_encode, backend)

    def encode(self, prompt: str, limits: Limits, param: str = "prompt") -> list[int]:
        """The token ids of a prompt. Raises an `ApiError` that names the field ``param``.

        A template may make half a surrogate pair of a field's JSON (arguments of calls, schemas of tools), which the
        tokenizer cannot read.
        """
        try:
            require_unicode("the prompt", prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from error
        if limits.max_prompt_tokens is not None and len(prompt) > limits.max_prompt_tokens * self._width:
            message = (
                f"the prompt has {len(prompt):,} characters, more than {limits.max_prompt_tokens:,} tokens can stand "
                "for; shorten it, or serve with a larger --max-prompt-tokens"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        ids = self._encode(prompt)
        if ids:
            return ids
        if self._start is None:
            message = "the prompt is empty and the tokenizer has no bos token to start from; give a prompt"
            raise ApiError(400, message, param=param)
        return [self._start]


def _encode(backend: Any, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


_alone = threading.Lock()


def _encode_alone(tokenizer: Any, text: str) -> list[int]:
    with _alone:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@dataclass(frozen=True)
class Prepared:
    """A valid request.

    Attributes:
        asked: without its prompts.
        prompts: int64 ids of each, as bytes.
        texts: with `echo`, each prompt that was text; None for token ids.
    """

    asked: Asked
    prompts: list[bytes]
    texts: list[str | None]


@contextlib.contextmanager
def depth_is_bounded() -> Iterator[None]:
    """A context in which JSON of too great a depth is a refusal."""
    try:
        yield
    except RecursionError as error:
        raise ApiError(
            400, "the body's lists and objects are too deep in each other; send a request as documented"
        ) from error


def check_scored(numbers: int) -> None:
    """Raises an `ApiError` for more log-probabilities of prompts than an answer may have."""
    if numbers > MOST_SCORED:
        raise ApiError(
            400,
            f"echo with logprobs would answer with {numbers:,} log-probabilities of prompts; at most {MOST_SCORED:,} "
            "are sent: ask for fewer alternatives or shorter prompts, or for /v1/score",
            param="logprobs", code="invalid_value",
        )  # fmt: skip


def check_echo(characters: int) -> None:
    if characters > MOST_ECHO:
        message = f"echo would answer with {characters:,} characters of prompts; at most {MOST_ECHO:,} are sent"
        raise ApiError(400, f"{message}: leave echo out", param="echo")
