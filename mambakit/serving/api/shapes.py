"""JSON schemas of answers, in small pieces from which operations make theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
NUMBER = {"type": "number"}
BOOLEAN = {"type": "boolean"}
ANY_OBJECT = {"type": "object"}


def record(properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object that has all of ``properties``, but for those that are ``optional``."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
    }


def array(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items)}


def constant(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


def nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


ERROR = record(
    {
        "error": record(
            {"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)},
        )
    }
)
STATE = record(
    {
        "id": STRING,
        "object": constant("state"),
        "created": INTEGER,
        "tokens": INTEGER,
        "bytes": INTEGER,
        "origin": STRING,
        "parent": nullable(STRING),
        "expires_at": nullable(INTEGER),
        "sha256": STRING,
        "can_branch": BOOLEAN,
        "metadata": ANY_OBJECT,
    }
)
KEPT_STATE = {"anyOf": [STATE, ERROR]}
USAGE = record(
    {
        "prompt_tokens": INTEGER,
        "completion_tokens": INTEGER,
        "total_tokens": INTEGER,
        "prompt_tokens_details": record({"cached_tokens": INTEGER}),
    },
    optional=("prompt_tokens_details",),
)
