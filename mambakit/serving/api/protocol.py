"""The completions API: a request's body to a valid request.

No field is ignored: one that is not served is refused by name, unless its value means the default.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mambakit.decoding.parameters import SAMPLING
from mambakit.quoting import quoted
from mambakit.serving.api.answers import DONE, Answer, Usage, event
from mambakit.serving.api.fields import MOST_STOPS, Limits, check_length, check_texts, check_tokens, read, wrong
from mambakit.serving.errors import ApiError

__all__ = [
    "DONE", "MOST_STOPS", "Answer", "ApiError", "Asked", "Limits", "Usage", "check_length", "check_tokens", "event",
    "parse", "parse_body",
]  # fmt: skip


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
        """The sampling parameters of text ``copy`` of a prompt: the n texts differ in their seeds."""
        seed = self.sampling["seed"]
        return self.sampling | {"seed": None if seed is None else seed + copy}


def parse_body(body: bytes) -> Any:
    """The JSON value of a body. NaN and infinities, which Python accepts, are refused later by their fields' checks.

    Raises:
        ApiError: it is no JSON, or an object in it has a field twice.
    """
    try:
        return json.loads(body, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object as application/json") from error
    except ValueError as error:  # Python parses integers of up to 4,300 digits
        raise ApiError(
            400, "the body is not JSON (a number has thousands of digits); send numbers that a float64 holds"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise wrong(twice, f"the field {quoted(twice)} is there twice; send it once")
    return found


def parse(body: Any, limits: Limits) -> Asked:
    """Check a request.

    Raises:
        ApiError: a field is unknown, not served or wrong, or the request is for another model.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; send an object with a prompt")
    values = read(body, limits)
    prompts, n, options = values["prompt"], values["n"], values["stream_options"]
    check_texts(len(prompts), n, limits)
    if options is not None and not values["stream"]:
        raise wrong("stream_options", "stream_options belong to a stream; add stream: true, or leave them out")
    return Asked(
        prompts=prompts,
        max_tokens=values["max_tokens"],
        sampling={name: values[name] for name in SAMPLING},
        stop=values["stop"],
        n=n,
        stream=values["stream"],
        include_usage=bool(options),
        echo=values["echo"],
    )
