"""Types of fields: checks of a value, and the JSON schema of what passes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mambakit.decoding.parameters import INT64, Number
from mambakit.number import LARGEST
from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Field, Fields, Limits, Schema, read, wrong

MOST_METADATA = 16


def number(declared: Number, about: str, required: bool = False) -> Field:
    """A number in its range."""
    schema: dict[str, Any] = {"type": "integer" if declared.whole else "number"}
    if declared.low > INT64[0]:
        schema["exclusiveMinimum" if declared.above else "minimum"] = declared.low
    if declared.high < (INT64[1] if declared.whole else LARGEST):
        schema["maximum"] = declared.high
    if declared.default is not None:
        schema["default"] = declared.default
    return Field(lambda name, value, _: declared.read(name, value), schema, about, required)


def flag(about: str, default: bool = False) -> Field:
    """true or false."""

    def check(name: str, value: Any, _: Limits) -> bool:
        return default if value is None else check_flag(name, value)

    return Field(check, {"type": "boolean", "default": default}, about)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {quoted(value)}; it must be true or false")
    return value


def text(about: str, most: int | None = None, required: bool = False) -> Field:
    """A string of at most ``most`` characters; None where there is none."""

    def check(name: str, value: Any, _: Limits) -> str | None:
        return None if value is None else check_text(name, value, most)

    return Field(check, {"type": "string"} | ({} if most is None else {"maxLength": most}), about, required)


def check_text(name: str, value: Any, most: int | None = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {quoted(value)}; it must be a string")
    if most is not None and len(value) > most:
        raise ValueError(f"{name} has {len(value):,} characters; at most {most:,} are served")
    require_unicode(name, value)
    return value


def metadata(about: str) -> Field:
    """An object of strings; None where there is none."""

    def check(name: str, value: Any, _: Limits) -> dict[str, str] | None:
        if value is None:
            return None
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise TypeError(f"{name} is {quoted(value)}; it must be an object of strings")
        if len(value) > MOST_METADATA:
            raise ValueError(f"{name} has {len(value)} entries; at most {MOST_METADATA} are served")
        for key, entry in value.items():
            if len(key) > 64 or len(entry) > 512:
                message = "keys have up to 64 characters, values up to 512"
                raise ValueError(f"{name} has the entry {quoted(key)}; {message}")
            require_unicode(name, key + entry)
        return value

    schema = {
        "type": "object",
        "additionalProperties": {"type": "string", "maxLength": 512},
        "propertyNames": {"maxLength": 64},
        "maxProperties": MOST_METADATA,
    }
    return Field(check, schema, about)


def choice(values: Sequence[str], about: str, default: str | None = None, required: bool = False) -> Field:
    """One of a few strings."""

    def check(name: str, value: Any, _: Limits) -> str | None:
        if value is None:
            return default
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{name} is {quoted(value)}; it must be {' or '.join(map(repr, values))}")
        found: str = value
        return found

    return Field(check, {"type": "string", "enum": list(values)}, about, required)


def group(fields: Fields, about: str, required: bool = False) -> Field:
    """An object of ``fields``: their values, or None where there is no object."""

    def check(name: str, value: Any, limits: Limits) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise TypeError(f"{name} is {quoted(value)}; it must be an object of {', '.join(fields)}")
        return read(fields, value, limits, f"{name}.")

    return Field(check, lambda limits: object_schema(fields, limits), about, required)


def object_schema(fields: Fields, limits: Limits) -> dict[str, Any]:
    """The JSON schema of an object of ``fields`` and no others."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: field.schema_for(limits) for name, field in fields.items()},
        "additionalProperties": False,
    }
    if required := [name for name, field in fields.items() if field.required]:
        schema["required"] = required
    return schema


def unserved(schema: Schema, neutral: tuple[Any, ...], remedy: str) -> Field:
    """A field of OpenAI's that is not served: its values that ask for nothing are taken, any other is refused."""

    def check(name: str, value: Any, _: Limits) -> None:
        if value is not None and (isinstance(value, bool) != (False in neutral) or value not in neutral):
            raise wrong(name, f"{name} is {quoted(value)}, but {name} is not served; {remedy}", "unsupported_parameter")

    return Field(check, schema, f"Not served: {remedy}.", served=False)


def require_unicode(name: str, text: str) -> None:
    """Raises ValueError for a string that no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair at {error.start}; send whole characters") from error
