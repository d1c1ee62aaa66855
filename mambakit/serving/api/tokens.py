"""`POST /tokenize` and `POST /detokenize`: texts and chats to tokens of the model, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mambakit.serving.api.asked import parse_body
from mambakit.serving.api.chat import PROMPT, prompt_of
from mambakit.serving.api.checks import check_tokens, ids_schema, read_ids
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.fields import MODEL
from mambakit.serving.api.prompts import Codec, depth_is_bounded
from mambakit.serving.api.values import flag, text

TOKENIZE: Fields = {
    "model": MODEL,
    "prompt": text("A text; or give messages."),
    **PROMPT,
    "messages": replace(PROMPT["messages"], required=False, about="A chat, whose prompt is tokenised."),
    "return_token_strs": flag("Whether the text of each token comes, too."),
}


def _ids(name: str, value: Any, limits: Limits) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of token ids")
    return read_ids(value, limits) if value else value


def _ids_schema(limits: Limits) -> dict[str, Any]:
    return {name: value for name, value in ids_schema(limits).items() if name != "minItems"}


DETOKENIZE: Fields = {
    "model": MODEL,
    "tokens": Field(_ids, _ids_schema, "give token ids", required=True),
}


@dataclass(frozen=True)
class Tokenised:
    """A tokenised text.

    Attributes:
        with_texts: whether the text of each token is to be shown.
    """

    ids: list[int]
    with_texts: bool


def tokenise(body: bytes, codec: Codec, limits: Limits) -> Tokenised:
    """The tokens of a body's text. Raises an `ApiError` for an invalid request."""
    with depth_is_bounded():
        values = read(TOKENIZE, parse_body(body), limits)
        prompt, messages = values["prompt"], values["messages"]
        if (prompt is None) == (messages is None):
            there = "neither prompt nor messages is there" if prompt is None else "prompt and messages are both there"
            raise wrong("prompt", f"{there}; give one of them")
        if prompt is None:
            prompt, _ = prompt_of(values, codec.template)
        ids = codec.encode(prompt, limits) if prompt else []  # an empty text has no token, though a prompt would
    if ids:
        check_tokens(ids, limits)
    return Tokenised(ids, values["return_token_strs"])


def token_ids(body: bytes, codec: Codec, limits: Limits) -> list[int]:
    """The token ids of a body. Raises an `ApiError` for an invalid request."""
    with depth_is_bounded():
        ids: list[int] = read(DETOKENIZE, parse_body(body), limits)["tokens"]
    return ids
