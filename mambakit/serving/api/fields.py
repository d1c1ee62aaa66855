"""Every field of a request for completions: its type, range and default, in a table. No field is ignored."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mambakit.decoding.parameters import INT64, SAMPLING, Number
from mambakit.generation.stopping import read_stops
from mambakit.quoting import cut, quoted
from mambakit.serving.errors import ApiError

MOST_STOPS, MOST_STOP_CHARACTERS = 4, 4096


@dataclass(frozen=True)
class Limits:
    """What a request may ask of this server.

    Attributes:
        model: its name in the API.
        vocab_size: token ids are below it.
        max_new_tokens: of one text.
        max_prompt_tokens: of one prompt; None is no limit: a longer one takes more time, not more memory.
        most_texts: prompts times n, at most.
    """

    model: str
    vocab_size: int
    max_new_tokens: int = 4096
    max_prompt_tokens: int | None = 65536
    most_texts: int = 128


def wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param)


# -- readers: (name of the field, its value or None, limits) -> the value to use

Reader = Callable[[str, Any, Limits], Any]


def _number(number: Number) -> Reader:
    return lambda name, value, limits: number.read(name, value)


def _max_tokens(name: str, value: Any, limits: Limits) -> int:
    most = limits.max_new_tokens
    tokens: int = Number(min(16, most), 1, most, whole=True).read(name, value)
    return tokens


def _flag(name: str, value: Any, _: Limits) -> bool:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} is {quoted(value)}; it must be true or false")
    return bool(value)


def _text(name: str, value: Any, _: Limits) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is {quoted(value)}; it must be a string")
    _require_unicode(name, value or "")
    return value


def _model(name: str, value: Any, limits: Limits) -> None:
    if _text(name, value, limits) not in (None, limits.model):
        message = f"model is {quoted(value)}; this server has {cut(limits.model)!r} alone"
        raise ApiError(404, message, param=name, code="model_not_found")


def _stops(name: str, value: Any, _: Limits) -> tuple[str, ...]:
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
        _require_unicode(name, stop)
    return stops


def _stream_options(name: str, value: Any, limits: Limits) -> bool | None:
    """include_usage; None where there are no options."""
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise ValueError(f"stream_options are {quoted(value)}; only include_usage is served")
    return _flag(f"{name}.include_usage", value.get("include_usage"), limits)


def _prompts(name: str, value: Any, limits: Limits) -> list[str] | list[list[int]]:
    """Cheap checks come first: a list may have millions of items."""
    if value is None:
        raise ValueError("there is no prompt; give a string, a list of strings, or token ids")
    if isinstance(value, str):
        value = [value]
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        value, kinds = [value], {list}
    if kinds not in ({str}, {list}):
        raise ValueError(
            f"prompt is {quoted(value)}; it must be a string, a list of strings, a list of token ids or a list of such "
            "lists, and not empty"
        )
    if len(value) > limits.most_texts:
        raise _too_many_texts(len(value), 1, limits)
    for prompt in value:
        if isinstance(prompt, str):
            _require_unicode(name, prompt)
        else:
            _check_ids(prompt, limits)
    return value


def _check_ids(ids: list[Any], limits: Limits) -> None:
    if not ids:
        raise ValueError("a prompt has no token ids; give at least one")
    check_length(len(ids), limits)
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= limits.vocab_size:
        token = next(t for t in ids if type(t) is not int or not 0 <= t < limits.vocab_size)
        raise ValueError(f"a token id is {quoted(token)}; they are 0 to {limits.vocab_size - 1}")


def check_tokens(ids: list[int], limits: Limits) -> None:
    """Check a tokenised prompt: a tokenizer may have tokens that the model does not.

    Raises:
        ApiError: too many, or one that the model does not have.
    """
    check_length(len(ids), limits)
    if max(ids) >= limits.vocab_size:
        known = f"its tokens are 0 to {limits.vocab_size - 1}"
        raise wrong("prompt", f"the prompt's text has token {max(ids)}, which the model does not have; {known}")


def check_length(tokens: int, limits: Limits) -> None:
    if limits.max_prompt_tokens is not None and tokens > limits.max_prompt_tokens:
        raise wrong(
            "prompt",
            f"the prompt has {tokens:,} tokens; at most {limits.max_prompt_tokens:,} are read here: shorten it, or "
            "serve with a larger --max-prompt-tokens",
        )


def check_texts(prompts: int, n: int, limits: Limits) -> None:
    if prompts * n > limits.most_texts:
        raise _too_many_texts(prompts, n, limits)


def _too_many_texts(prompts: int, n: int, limits: Limits) -> ApiError:
    return wrong(
        "prompt" if n == 1 else "n",
        f"{prompts} prompts with n {n} are {prompts * n} texts, but at most {limits.most_texts} can run and wait "
        "here; send fewer at a time, or serve with a larger --max-texts and --max-waiting",
    )


def _require_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair at {error.start}; send whole characters") from error


# -- the tables

_NARROWER = {
    "temperature": replace(SAMPLING["temperature"], high=2),
    "top_k": replace(SAMPLING["top_k"], high=1 << 31),
    "repetition_penalty": replace(SAMPLING["repetition_penalty"], high=100),
    "presence_penalty": replace(SAMPLING["presence_penalty"], low=-2, high=2),
    "frequency_penalty": replace(SAMPLING["frequency_penalty"], low=-2, high=2),
    # The n texts of a prompt have consecutive seeds, all of which torch's generators accept.
    "seed": replace(SAMPLING["seed"], low=INT64[0], high=INT64[1]),
}
FIELDS: dict[str, Reader] = {
    "model": _model,
    "max_tokens": _max_tokens,
    **{name: _number(_NARROWER.get(name, number)) for name, number in SAMPLING.items()},
    "stop": _stops,
    "n": _number(Number(1, 1, 128, whole=True)),
    "stream": _flag,
    "stream_options": _stream_options,
    "echo": _flag,
    "user": _text,
    "prompt": _prompts,
}
# OpenAI's fields that are not served: the values that mean "off", and what to do instead.
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((None,), "leave it out; `mambakit score` and `mambakit generate --logprobs` give log-probabilities"),
    "logit_bias": ((None, {}), "leave it out"),
    "best_of": ((None, 1), "leave it out; n gives several texts to choose from"),
    "suffix": ((None,), "leave it out; the model only continues text"),
}


def read(body: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The value of every field, its default where ``body`` does not have it.

    Raises:
        ApiError: a field that is not known or not served, or a value that is not of its type or range.
    """
    for name, value in body.items():
        if name in _UNSERVED:
            neutral, remedy = _UNSERVED[name]
            if isinstance(value, bool) or value not in neutral:
                raise wrong(name, f"{name} is {quoted(value)}, but {name} is not served; {remedy}")
        elif name not in FIELDS:
            close = difflib.get_close_matches(cut(name), FIELDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"served are {', '.join(FIELDS)}"
            raise wrong(name, f"there is no field {quoted(name)}; {hint}")
    values = {}
    for name, reader in FIELDS.items():
        try:
            values[name] = reader(name, body.get(name), limits)
        except (TypeError, ValueError) as error:
            raise wrong(name, str(error)) from error
    return values
