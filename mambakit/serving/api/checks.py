"""Checks that several fields share: of prompts, token ids, stop strings and the number of texts."""

from __future__ import annotations

from typing import Any

from mambakit.generation.stopping import read_stops
from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Limits, wrong
from mambakit.serving.api.values import require_unicode
from mambakit.serving.errors import ApiError

MOST_STOPS, MOST_STOP_CHARACTERS = 4, 4096


def read_prompts(name: str, value: Any, limits: Limits) -> list[str] | list[list[int]]:
    """Prompts as strings or as token ids. Cheap checks come first: a list may have millions of items."""
    if isinstance(value, str):
        value = [value]
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds and kinds <= {int, float}:
        value, kinds = [value], {list}
    if kinds not in ({str}, {list}):
        raise ValueError(
            f"{name} is {quoted(value)}; it must be a string, a list of strings, a list of token ids or a list of such "
            "lists, and not empty"
        )
    if len(value) > limits.most_texts:
        raise _too_many_texts(len(value), 1, limits)
    for prompt in value:
        if isinstance(prompt, str):
            require_unicode(name, prompt)
    return value if kinds == {str} else [read_ids(prompt, limits) for prompt in value]


def prompts_schema(limits: Limits) -> dict[str, Any]:
    ids = ids_schema(limits)
    return {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": limits.most_texts},
            ids,
            {"type": "array", "items": ids, "minItems": 1, "maxItems": limits.most_texts},
        ]
    }


def read_ids(ids: list[Any], limits: Limits) -> list[int]:
    """Token ids; 16.0 is one. Raises ValueError, or an `ApiError` where there are too many."""
    if not ids:
        raise ValueError("there are no token ids; give at least one")
    check_length(len(ids), limits)
    if float in set(map(type, ids)):
        ids = [int(one) if isinstance(one, float) and one.is_integer() else one for one in ids]
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= limits.vocab_size:
        token = next(t for t in ids if type(t) is not int or not 0 <= t < limits.vocab_size)
        raise ValueError(f"a token id is {quoted(token)}; they are 0 to {limits.vocab_size - 1}")
    return ids


def ids_schema(limits: Limits) -> dict[str, Any]:
    most = {} if limits.max_prompt_tokens is None else {"maxItems": limits.max_prompt_tokens}
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    return {"type": "array", "items": token, "minItems": 1, **most}


def check_tokens(ids: list[int], limits: Limits, param: str = "prompt") -> None:
    """Check a tokenised prompt: a tokenizer may have tokens that the model does not.

    Raises:
        ApiError: too many, or one that the model does not have.
    """
    check_length(len(ids), limits, param)
    if ids and max(ids) >= limits.vocab_size:
        known = f"its tokens are 0 to {limits.vocab_size - 1}"
        raise wrong(param, f"the {param}'s text has token {max(ids)}, which the model does not have; {known}")


def check_length(tokens: int, limits: Limits, param: str = "prompt") -> None:
    if limits.max_prompt_tokens is not None and tokens > limits.max_prompt_tokens:
        raise wrong(
            param,
            f"the prompt has {tokens:,} tokens; at most {limits.max_prompt_tokens:,} are read here: shorten it, or "
            "serve with a larger --max-prompt-tokens",
            "context_length_exceeded",
        )


def check_texts(prompts: int, n: int, limits: Limits, param: str = "n") -> None:
    """Raises an `ApiError` where ``n`` texts for each of the prompts are more than one request may have."""
    if prompts * n > limits.most_texts:
        raise _too_many_texts(prompts, n, limits, param)


def _too_many_texts(prompts: int, n: int, limits: Limits, param: str = "n") -> ApiError:
    return wrong(
        "prompt" if n == 1 else param,
        f"{prompts} prompts with {param} {n} are {prompts * n} texts, but at most {limits.most_texts} can run and wait "
        "here; send fewer at a time, or serve with a larger --max-texts and --max-waiting",
    )


def read_stop_strings(name: str, value: Any, _: Limits) -> tuple[str, ...]:
    if isinstance(value, list) and len(value) > MOST_STOPS:
        raise ValueError(f"stop has {len(value)} strings; at most {MOST_STOPS} are served")
    try:
        stops = read_stops(value)
    except (TypeError, ValueError) as error:
        message = f"stop is {quoted(value)}; it must be a string or a list of strings, none of them empty"
        raise ValueError(message) from error
    for stop in stops:
        if len(stop) > MOST_STOP_CHARACTERS:
            raise ValueError(f"a stop string has {len(stop):,} characters; at most {MOST_STOP_CHARACTERS:,} are served")
        require_unicode(name, stop)
    return stops


_STOP = {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS}
STOP_SCHEMA: dict[str, Any] = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}]}
