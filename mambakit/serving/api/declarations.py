"""How a request is declared: fields with their type, range and meaning, and operations of the API made of them.

One declaration has two readers: `read` checks a request by it, and `mambakit.serving.api.openapi` writes it into the
OpenAPI document. No field is ignored: one that is not declared is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mambakit.quoting import cut, quoted
from mambakit.serving.errors import ApiError


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


# (name of the field, its value or None, limits) -> the value to use. TypeError and ValueError say what is wrong.
Reader: TypeAlias = Callable[[str, Any, Limits], Any]
# A JSON schema of the values but null, or what makes it from the limits.
Schema: TypeAlias = "dict[str, Any] | Callable[[Limits], dict[str, Any]]"


@dataclass(frozen=True)
class Field:
    """One field of a JSON object. A value of null, or no value, is the default.

    Attributes:
        read: checks a value and converts it.
        schema: of its values, as the document shows it.
        about: one sentence.
        required: whether null and no value are refused.
        served: whether it does something here; one that does not is known, so that its refusal can say what to do.
    """

    read: Reader
    schema: Schema
    about: str
    required: bool = False
    served: bool = True

    def schema_for(self, limits: Limits) -> dict[str, Any]:
        """The schema under these limits; null is allowed where it is not required."""
        schema = dict(self.schema(limits) if callable(self.schema) else self.schema)
        if not self.required:
            schema = _nullable(schema)
        return {"description": self.about, **schema}


Fields: TypeAlias = Mapping[str, Field]


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if kind == "null":
        return schema
    if not isinstance(kind, str):
        return {"anyOf": [schema, {"type": "null"}]} if schema else schema
    return {
        **schema,
        "type": [kind, "null"],
        **({"enum": [*schema["enum"], None]} if "enum" in schema else {}),
    }


def wrong(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """The refusal of a request for one of its fields: 400."""
    return ApiError(400, message, param=param, code=code)


def read(fields: Fields, body: Mapping[str, Any], limits: Limits, inside: str = "") -> dict[str, Any]:
    """The value of every field, its default where ``body`` does not have it.

    Args:
        inside: of which field ``body`` is the value, with a dot behind it; "" for a whole request.

    Raises:
        ApiError: a field that is not known or not served, or a value that is not of its type or range.
    """
    for name in body:
        if name not in fields:
            served = [inside + known for known, field in fields.items() if field.served]
            close = difflib.get_close_matches(cut(name), fields, 1)
            hint = f"did you mean {inside + close[0]!r}?" if close else f"served are {', '.join(served)}"
            raise wrong(inside + name, f"there is no field {quoted(inside + name)}; {hint}", "unknown_parameter")
    values = {}
    for name, field in fields.items():
        value = body.get(name)
        if field.required and value is None:
            raise wrong(inside + name, f"there is no {inside}{name}; {field.about}", "missing_required_parameter")
        try:
            values[name] = field.read(inside + name, value, limits)
        except TypeError as error:
            raise wrong(inside + name, str(error), "invalid_type") from error
        except ValueError as error:
            raise wrong(inside + name, str(error)) from error
    return values


@dataclass(frozen=True)
class Parameter:
    """A value in an operation's path or query.

    Attributes:
        where: "path" or "query".
    """

    name: str
    about: str
    schema: Mapping[str, Any]
    where: str = "path"


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        path: as in Starlette: ``/v1/models/{model:path}``.
        summary: one sentence.
        result: JSON schema of the answer with status 200; None where it is not JSON.
        fields: of the JSON body; None where it has none.
        either: fields, none of which is required alone, of which a body has at least one.
        exclusive: whether a body has one of ``either`` only.
        parameters: of path and query.
        media: content types of the answer.
        statuses: of errors, besides those that every operation may have.
        open: whether it is answered without an API key.
    """

    method: str
    path: str
    summary: str
    result: Mapping[str, Any] | None = None
    fields: Fields | None = None
    either: tuple[str, ...] = ()
    exclusive: bool = False
    parameters: tuple[Parameter, ...] = ()
    media: tuple[str, ...] = ("application/json",)
    statuses: tuple[int, ...] = ()
    open: bool = False
