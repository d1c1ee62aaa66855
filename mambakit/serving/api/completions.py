"""`POST /v1/completions`: its fields, and a body to a valid request with its prompts as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mambakit.decoding.parameters import Number
from mambakit.serving.api.asked import Asked, asked, parse_body
from mambakit.serving.api.checks import check_tokens, prompts_schema, read_prompts
from mambakit.serving.api.declarations import Field, Fields, Limits, read, wrong
from mambakit.serving.api.fields import GENERATION, MOST_ALTERNATIVES, max_tokens, require_one_limit
from mambakit.serving.api.prompts import Codec, Prepared, check_echo, check_scored, depth_is_bounded
from mambakit.serving.api.values import flag, number, unserved

COMPLETIONS: Fields = {
    **GENERATION,
    "prompt": Field(read_prompts, prompts_schema, "give a string, a list of strings, or token ids", required=True),
    "max_tokens": max_tokens(0, 16, "New tokens of each text, at most. 0 only with echo."),
    "max_completion_tokens": max_tokens(0, None, "The same, by its name in chats."),
    "echo": flag("Whether the answer begins with the prompt."),
    "logprobs": number(
        Number(None, 0, MOST_ALTERNATIVES, whole=True),
        "Log-probabilities of each token and of so many of the likeliest ones; with echo also of the prompt's.",
    ),
    "best_of": number(
        Number(None, 1, 128, whole=True), "Texts to write for each prompt, of which the n likeliest are answered."
    ),
    "suffix": unserved({"type": "string", "maxLength": 0}, ("",), "leave it out; the model only continues text"),
}


def parse(body: Mapping[str, Any], limits: Limits) -> Asked:
    """Check a request.

    Raises:
        ApiError: a field is unknown, not served or wrong, or the request is for another model.
    """
    values = read(COMPLETIONS, body, limits)
    most, echo = values["max_tokens"], values["echo"]
    if (newer := values["max_completion_tokens"]) is not None:
        require_one_limit(None if body.get("max_tokens") is None else most, newer)
        most = newer
    if not most and not echo:
        name = "max_tokens" if newer is None else "max_completion_tokens"
        message = f"{name} is 0; it must be a whole number, at least 1 and at most {limits.max_new_tokens}"
        raise wrong(name, f"{message}; with echo it may be 0")
    return asked(
        values, values["prompt"], most, limits, best_of=values["best_of"], log_probs=values["logprobs"], echo=echo
    )


def prepare(body: bytes, codec: Codec, limits: Limits) -> Prepared:
    """Parse and tokenise a body. Raises an `ApiError` for an invalid request."""
    with depth_is_bounded():
        asked = parse(parse_body(body), limits)
    prompts, texts = [], []
    for prompt in asked.prompts:
        ids = prompt if isinstance(prompt, list) else codec.encode(prompt, limits) if prompt or not asked.state else []
        check_tokens(ids, limits)
        prompts.append(array("q", ids).tobytes())
        texts.append(prompt if asked.echo and isinstance(prompt, str) else None)
    if asked.echo:
        check_echo(asked.n * sum(len(text or "") for text in texts))
        tokens = asked.n * sum(len(ids) // 8 for ids in prompts)
        check_echo(tokens)  # the text of ids is not known yet
        if asked.options.prompt_log_probs:
            check_scored(tokens * (1 + (asked.options.log_probs or 0)))
    return Prepared(replace(asked, prompts=[]), prompts, texts)
