"""States as a resource: the fields of requests that start from one or leave one, and the bodies of `/v1/states`."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

from mambakit.decoding.parameters import Number
from mambakit.quoting import quoted
from mambakit.serving.api.checks import check_tokens, ids_schema, read_ids
from mambakit.serving.api.declarations import Field, Fields, Limits, read
from mambakit.serving.api.values import metadata, number, object_schema, require_unicode, text

_YEARS = 10 * 366 * 86400.0
EXPIRES = number(Number(None, 1.0, _YEARS), "Seconds after which the state expires; the server's default if absent.")
KEEP: Fields = {"expires_after": EXPIRES, "metadata": metadata("Strings that belong to the state.")}


@dataclass(frozen=True)
class Keep:
    """How a state is to be kept.

    Attributes:
        expires_after: seconds; None: the server's default.
        metadata: the client's own.
    """

    expires_after: float | None = None
    metadata: dict[str, str] | None = None


def _keep(name: str, value: Any, limits: Limits) -> Keep | None:
    if value is None or value is False:
        return None
    if value is True:
        return Keep()
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {quoted(value)}; it must be true, false, or an object of {', '.join(KEEP)}")
    return Keep(**read(KEEP, value, limits, f"{name}."))


STATE = text("Extension: the id of a state to start from; the prompt comes after what it has read.", most=64)
TEXT_STATES: Fields = {
    "state": STATE,
    "keep_state": Field(
        _keep,
        lambda limits: {"anyOf": [{"type": "boolean"}, object_schema(KEEP, limits)]},
        "Extension: whether each text leaves a state, which has read prompt and text; its choice names it.",
    ),
}
QUEUE: Fields = {
    "priority": number(
        Number(0, -1000, 1000, whole=True), "Extension: among the waiting texts of your key the smallest is the first."
    ),
    "deadline": number(
        Number(None, 0.001, 7 * 86400.0), "Extension: seconds after which the request is of no use, and ends with 504."
    ),
    "cache_salt": text("Extension: prompts share the prefix cache with those of the same salt alone.", most=256),
}


def _prompt(name: str, value: Any, limits: Limits) -> str | list[int]:
    if value is None:
        return ""
    if isinstance(value, str):
        require_unicode(name, value)
        return value
    if not isinstance(value, list):
        raise TypeError(f"{name} is {quoted(value)}; it must be a string or a list of token ids")
    return read_ids(value, limits)


def _prompt_schema(limits: Limits) -> dict[str, Any]:
    return {"anyOf": [{"type": "string"}, ids_schema(limits)]}


def create_fields(model: Field) -> Fields:
    """Of `POST /v1/states`."""
    return {
        "model": model,
        "prompt": Field(_prompt, _prompt_schema, "The text to read, or its token ids."),
        "state": STATE,
        **KEEP,
        **QUEUE,
    }


FORK: Fields = {**KEEP}
BRANCH: Fields = {
    "at": number(Number(None, 1, (1 << 31) - 1, whole=True), "give the number of tokens to keep", required=True),
    **KEEP,
    **QUEUE,
}


@dataclass(frozen=True)
class Created:
    """A valid request for a state.

    Attributes:
        prompt: int64 ids, as bytes.
        at: of a branch: how many tokens of the state's text it keeps.
    """

    keep: Keep
    prompt: bytes = b""
    state: str = ""
    at: int = 0
    priority: int = 0
    deadline: float = math.inf
    cache_salt: str = ""


def created(values: dict[str, Any], ids: list[int], limits: Limits) -> Created:
    """From the values of fields, and the tokens of the prompt."""
    check_tokens(ids, limits)
    return Created(
        Keep(values["expires_after"], values["metadata"]),
        array("q", ids).tobytes(),
        values.get("state") or "",
        values.get("at") or 0,
        values.get("priority") or 0,
        values.get("deadline") or math.inf,
        values.get("cache_salt") or "",
    )
