"""The fields that every request for texts has, completions and chat alike: sampling, ends, number, streaming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mambakit.decoding.parameters import INT64, SAMPLING, Number
from mambakit.quoting import cut, quoted
from mambakit.serving.api.checks import STOP_SCHEMA, read_stop_strings
from mambakit.serving.api.declarations import Field, Fields, Limits, wrong
from mambakit.serving.api.formats import FORMS
from mambakit.serving.api.states import QUEUE, TEXT_STATES
from mambakit.serving.api.values import check_text, flag, group, metadata, number, text, unserved
from mambakit.serving.errors import ApiError


def _model(name: str, value: Any, limits: Limits) -> None:
    if value is not None and check_text(name, value) != limits.model:
        message = f"model is {quoted(value)}; this server has {cut(limits.model)!r} alone"
        raise ApiError(404, message, param=name, code="model_not_found")


def max_tokens(least: int, default: int | None, about: str) -> Field:
    """A limit of new tokens; ``default`` None: None where there is no value."""

    def declared(limits: Limits) -> Number:
        most = limits.max_new_tokens
        return Number(None if default is None else min(default, most), least, most, whole=True)

    def schema(limits: Limits) -> dict[str, Any]:
        number = declared(limits)
        found = {"type": "integer", "minimum": least, "maximum": int(number.high)}
        return found if number.default is None else found | {"default": number.default}

    return Field(lambda name, value, limits: declared(limits).read(name, value), schema, about)


def require_one_limit(limit: int | None, newer: int | None) -> None:
    """Refuse a request whose limit of new tokens is two different ones, by its two names."""
    if limit is not None and newer is not None and limit != newer:
        raise wrong("max_tokens", f"max_tokens is {limit} and max_completion_tokens is {newer}; give one of them")


def _logit_bias(name: str, value: Any, limits: Limits) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {quoted(value)}; it must be an object of token ids and numbers")
    if len(value) > MOST_BIASES:
        raise ValueError(f"{name} has {len(value):,} tokens; at most {MOST_BIASES:,} are served")
    found = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12 and int(token) < limits.vocab_size):
            raise ValueError(f"a token of {name} is {quoted(token)}; they are 0 to {limits.vocab_size - 1}")
        found[int(token)] = _BIAS.read(f"{name}[{quoted(token)}]", bias)
    return found or None


MOST_BIASES = 1024
MOST_ALTERNATIVES = 20  # of the likeliest tokens, at each place
_BIAS = Number(0.0, -100, 100)


# Narrower than in Python, where that is OpenAI's range or a larger number would mean nothing.
_NARROWER = {
    "temperature": replace(SAMPLING["temperature"], high=2),
    "top_k": replace(SAMPLING["top_k"], high=1 << 31),
    "repetition_penalty": replace(SAMPLING["repetition_penalty"], high=100),
    "presence_penalty": replace(SAMPLING["presence_penalty"], low=-2, high=2),
    "frequency_penalty": replace(SAMPLING["frequency_penalty"], low=-2, high=2),
    # The n texts of a prompt have consecutive seeds, all of which torch's generators accept.
    "seed": replace(SAMPLING["seed"], low=INT64[0], high=INT64[1]),
}
_ABOUT = {
    "temperature": "Logits are divided by it; 0 is greedy.",
    "top_k": "Extension: only so many of the likeliest tokens; 0 is off.",
    "top_p": "Only the likeliest tokens, up to this probability together.",
    "min_p": "Extension: only tokens of at least this share of the likeliest one's probability.",
    "repetition_penalty": "Extension, as in transformers: logits of tokens of prompt and text are divided by it.",
    "seed": "The same seed, the same text; the n texts of a prompt take seed, seed + 1, ...",
    "typical_p": "Extension, as in transformers; 1 is off.",
    "epsilon_cutoff": "Extension, as in transformers: only tokens of at least this probability; 0 is off.",
    "presence_penalty": "Subtracted from the logits of tokens that the text has already.",
    "frequency_penalty": "The same, for each time that the text has it.",
}
STREAM_OPTIONS: Fields = {
    "include_usage": flag("Whether a last event has the usage."),
    "include_obfuscation": unserved({"type": "boolean", "enum": [False]}, (False,), "leave it out"),
}
MODEL = Field(_model, lambda limits: {"type": "string", "enum": [limits.model]}, "This server's model; no other.")
GENERATION: Fields = {
    "model": MODEL,
    **{name: number(_NARROWER.get(name, declared), _ABOUT[name]) for name, declared in SAMPLING.items()},
    "stop": Field(
        read_stop_strings, STOP_SCHEMA, "Strings that end a text; it does not have them. Up to 4 of 4,096 characters."
    ),
    "logit_bias": Field(
        _logit_bias,
        {
            "type": "object",
            "patternProperties": {"^[0-9]{1,11}$": {"type": "number", "minimum": -100, "maximum": 100}},
            "additionalProperties": False,
            "maxProperties": MOST_BIASES,
        },
        "Token ids, and what is added to their logits.",
    ),
    "min_tokens": number(
        Number(0, 0, INT64[1], whole=True), "Extension: no end-of-text token before so many new tokens."
    ),
    "ignore_eos": flag("Extension: end-of-text tokens do not end the text."),
    **FORMS,
    "n": number(Number(1, 1, 128, whole=True), "Texts for each prompt."),
    "stream": flag("Whether the answer comes as server-sent events."),
    "stream_options": group(STREAM_OPTIONS, "Options of a stream."),
    "user": text("Of no effect."),
    "metadata": metadata("Strings that come back with the answer."),
    **TEXT_STATES,
    **QUEUE,
}
"""In the order of the document."""
