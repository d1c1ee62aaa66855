"""The completions API: what can be asked, how it is answered, and how it is refused.

Nothing that is asked is passed over: a field that is not served is refused by name, unless it says what holds without it.
"""

from __future__ import annotations

import difflib
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MOST_STOPS = 4
# The seeds of the n texts after one prompt are consecutive numbers, all of which torch's generators take.
_SEEDS = (-(1 << 63), (1 << 63) - 1)
_COUNTS = (1, 128)


class ApiError(Exception):
    """An answer that is not a text, in OpenAI's shape.

    Args:
        status: of HTTP.
        message: value, limit and remedy.
        param: the field that it is about.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


@dataclass(frozen=True)
class Limits:
    """What a request may ask of this server.

    Attributes:
        model: the name it goes by.
        vocab_size: token ids are below it.
        max_new_tokens: of one text.
        max_prompt_tokens: of one prompt; None for any number, since a longer one takes no more memory.
        most_texts: prompts times n: as many as can wait and run.
    """

    model: str
    vocab_size: int
    max_new_tokens: int = 4096
    max_prompt_tokens: int | None = None
    most_texts: int = 256


@dataclass(frozen=True)
class Asked:
    """A valid request for completions."""

    prompts: list[str] | list[list[int]]
    max_tokens: int
    sampling: dict[str, Any]
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    echo: bool

    def sampling_of(self, copy: int) -> dict[str, Any]:
        """The n texts after one prompt differ by their seeds."""
        seed = self.sampling["seed"]
        return self.sampling | {"seed": None if seed is None else seed + copy}


@dataclass(frozen=True)
class _Number:
    default: float | int | None
    low: float
    high: float
    whole: bool = False
    above: bool = False
    """Whether ``low`` itself is excluded."""

    def read(self, name: str, value: Any) -> Any:
        if value is None:
            return self.default
        kind = "a whole number" if self.whole else "a number"
        said = json.dumps(value)
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise _wrong(name, f"{name} is {said}; it must be {kind}")
        if not (self.low <= value <= self.high) or (self.above and value == self.low):
            low = f"above {self.low}" if self.above else f"at least {self.low}"
            raise _wrong(name, f"{name} is {said}; it must be {kind}, {low} and at most {self.high}")
        return value


_SAMPLING = {
    "temperature": _Number(1.0, 0, 2),
    "top_p": _Number(1.0, 0, 1, above=True),
    "top_k": _Number(0, 0, 1 << 31, whole=True),
    "min_p": _Number(0.0, 0, 1),
    "repetition_penalty": _Number(1.0, 0, 100, above=True),
    "seed": _Number(None, *_SEEDS, whole=True),
}
# OpenAI's fields that are not served: the values that ask for nothing, and what to do instead.
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((None,), "leave it out; `mambakit score` and `mambakit generate --logprobs` give log-probabilities"),
    "logit_bias": ((None, {}), "leave it out"),
    "presence_penalty": ((None, 0), "leave it out; repetition_penalty discourages tokens used before"),
    "frequency_penalty": ((None, 0), "leave it out; repetition_penalty discourages tokens used before"),
    "best_of": ((None, 1), "leave it out; n gives several texts to choose from"),
    "suffix": ((None,), "leave it out; the model only continues text"),
}
_FIELDS = ("model", "prompt", "max_tokens", *_SAMPLING, "stop", "n", "stream", "stream_options", "echo", "user")


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param)


def parse_body(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object as application/json") from error


def parse(body: Any, limits: Limits) -> Asked:
    """Check a request.

    Raises:
        ApiError: it asks for what is not served here, or for another model.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; send an object with a prompt")
    for name, value in body.items():
        if name in _UNSERVED:
            neutral, remedy = _UNSERVED[name]
            if isinstance(value, bool) or value not in neutral:
                raise _wrong(name, f"{name} is {_short(value)}, but {name} is not served; {remedy}")
        elif name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"served are {', '.join(_FIELDS)}"
            raise _wrong(name, f"there is no field {_short(name)}; {hint}")
    model = body.get("model")
    if model is not None and model != limits.model:
        message = f"model is {_short(model)}; this server has {limits.model!r} alone"
        raise ApiError(404, message, param="model", code="model_not_found")
    stream = _flag(body, "stream")
    n = _Number(1, *_COUNTS, whole=True).read("n", body.get("n"))
    prompts = _prompts(body.get("prompt"), limits)
    if len(prompts) * n > limits.most_texts:
        raise _wrong(
            "prompt" if n == 1 else "n",
            f"{len(prompts)} prompts with n {n} are {len(prompts) * n} texts, but at most {limits.most_texts} can run and wait "
            "here; send fewer at a time, or serve with a larger --max-waiting",
        )
    return Asked(
        prompts=prompts,
        max_tokens=_Number(min(16, limits.max_new_tokens), 1, limits.max_new_tokens, whole=True).read(
            "max_tokens", body.get("max_tokens")
        ),
        sampling={name: number.read(name, body.get(name)) for name, number in _SAMPLING.items()},
        stop=_stops(body.get("stop")),
        n=n,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        echo=_flag(body, "echo"),
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, f"{name} is {_short(value)}; it must be true or false")
    return bool(value)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise _wrong("stream_options", "stream_options belong to a stream; add stream: true, or leave them out")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise _wrong("stream_options", f"stream_options are {_short(options)}; only include_usage is served")
    return _flag(options, "include_usage")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"stop is {_short(value)}; it must be a string or a list of strings, none of them empty")
    if len(stops) > MOST_STOPS:
        raise _wrong("stop", f"stop has {len(stops)} strings; at most {MOST_STOPS} are served")
    for stop in stops:
        _require_unicode("stop", stop)
    return tuple(stops)


def _prompts(value: Any, limits: Limits) -> list[str] | list[list[int]]:
    if value is None:
        raise _wrong("prompt", "there is no prompt; give a string, a list of strings, or token ids")
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(t) is int for t in value)):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(p, str) for p in value):
        for prompt in value:
            _require_unicode("prompt", prompt)
        return value
    if not isinstance(value, list) or not value or not all(isinstance(p, list) for p in value):
        raise _wrong(
            "prompt",
            f"prompt is {_short(value)}; it must be a string, a list of strings, a list of token ids or a list of such lists, "
            "and not empty",
        )
    for ids in value:
        if not ids:
            raise _wrong("prompt", "a prompt has no token ids; give at least one")
        for token in ids:
            if type(token) is not int or not 0 <= token < limits.vocab_size:
                raise _wrong("prompt", f"a token id is {_short(token)}; they are 0 to {limits.vocab_size - 1}")
    return value


def _require_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, f"{name} has half of a surrogate pair at {error.start}; send whole characters") from error


def check_length(tokens: int, limits: Limits) -> None:
    if limits.max_prompt_tokens is not None and tokens > limits.max_prompt_tokens:
        raise _wrong(
            "prompt",
            f"the prompt has {tokens:,} tokens; at most {limits.max_prompt_tokens:,} are read here: shorten it, or serve with a "
            "larger --max-prompt-tokens",
        )


@dataclass
class Usage:
    prompt_tokens: int
    cached_tokens: int | None = None
    """None where no prefix cache is kept."""
    completion_tokens: int = 0

    @property
    def body(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
        }  # fmt: skip
        if self.cached_tokens is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return counts


@dataclass
class Answer:
    """The shapes of one answer, whole or in events."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    def whole(self, texts: Iterable[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """All (text, finish_reason), in order."""
        choices = [_choice(index, text, reason) for index, (text, reason) in enumerate(texts)]
        return self._body(choices) | {"usage": usage.body}

    def event(self, index: int, text: str, finish_reason: str, usage: bool) -> bytes:
        """``usage``: whether the stream ends with a usage event, of which the others then say that they have none."""
        return event(self._body([_choice(index, text, finish_reason)]) | ({"usage": None} if usage else {}))

    def usage_event(self, usage: Usage) -> bytes:
        return event(self._body([]) | {"usage": usage.body})


def _choice(index: int, text: str, finish_reason: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason or None}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
