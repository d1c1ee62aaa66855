"""A valid request for texts, and the JSON that it is read from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mambakit.quoting import quoted
from mambakit.serving.api.declarations import wrong
from mambakit.serving.errors import ApiError


@dataclass(frozen=True)
class Asked:
    """A valid request for texts."""

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


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. NaN and infinities, which Python accepts, are refused later by their fields' checks.

    Raises:
        ApiError: it is no JSON object, or an object in it has a field twice.
    """
    try:
        found = json.loads(body, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object as application/json") from error
    except ValueError as error:  # Python parses integers of up to 4,300 digits
        raise ApiError(
            400, "the body is not JSON (a number has thousands of digits); send numbers that a float64 holds"
        ) from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {type(found).__name__}; send an object of fields")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise wrong(twice, f"the field {quoted(twice)} is there twice; send it once")
    return found
