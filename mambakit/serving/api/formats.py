"""The form of a text: a JSON object, a JSON schema, a regular expression or a grammar that it must follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mambakit.generation.grammars import grammar_of
from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Field, Fields, Limits, wrong
from mambakit.serving.api.shapes import ANY_OBJECT
from mambakit.serving.api.values import choice, flag, group, text

MOST_FORM_CHARACTERS = 1 << 16


def _schema(name: str, value: Any, _: Limits) -> str | None:
    """As JSON text."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {quoted(value)}; it must be a JSON schema, as an object")
    written = json.dumps(value)
    if len(written) > MOST_FORM_CHARACTERS:
        raise ValueError(f"{name} has {len(written):,} characters of JSON; at most {MOST_FORM_CHARACTERS:,} are served")
    return written


_JSON_SCHEMA: Fields = {
    "name": text("Of no effect.", most=64),
    "description": text("Of no effect."),
    "schema": Field(_schema, ANY_OBJECT, "The JSON schema.", required=True),
    "strict": flag("Of no effect: the text always follows the schema."),
}
_FORMAT: Fields = {
    "type": choice(
        ("text", "json_object", "json_schema"), "text is free; json_object is any JSON object.", required=True
    ),
    "json_schema": group(_JSON_SCHEMA, "With type json_schema: the schema that the text follows."),
}
FORMS: Fields = {
    "response_format": group(_FORMAT, "The form of the text."),
    "regex": text(
        "Extension: the regular expression (Rust's syntax) that the whole text matches.", MOST_FORM_CHARACTERS
    ),
    "grammar": text(
        "Extension: the grammar in Lark's syntax whose rule start is the whole text.", MOST_FORM_CHARACTERS
    ),
}


def read_form(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The constraint of a request's values of `FORMS`: its kind and its text, as `TextOptions.constraint`.

    Raises:
        ApiError: several, one that does not compile, or a response_format whose schema is missing or of no use.
    """
    found: list[tuple[str, str, str]] = []
    if (form := values["response_format"]) is not None:
        kind, schema = form["type"], form["json_schema"]
        if kind == "json_schema" and schema is None:
            raise wrong(
                "response_format.json_schema", "response_format has type json_schema and no json_schema; give one",
                "missing_required_parameter",
            )  # fmt: skip
        if kind != "json_schema" and schema is not None:
            raise wrong("response_format.json_schema", "json_schema goes with type json_schema; give that type")
        if kind != "text":
            found.append(
                ("response_format", "json_schema", '{"type": "object"}' if schema is None else schema["schema"])
            )
    found += [(name, name, values[name]) for name in ("regex", "grammar") if values[name] is not None]
    if len(found) > 1:
        given = " and ".join(name for name, *_ in found)
        raise wrong(found[1][0], f"{given} each say which form the text has; give one of them")
    if not found:
        return None
    (name, kind, value), *_ = found
    try:
        grammar_of(kind, value)
    except ValueError as error:
        raise wrong(name, str(error)) from error
    return kind, value
