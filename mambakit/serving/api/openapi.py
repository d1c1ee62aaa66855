"""The OpenAPI document, made from the declarations by which requests are checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from mambakit.serving.api.declarations import Limits, Operation
from mambakit.serving.api.shapes import ERROR, STRING, record
from mambakit.serving.api.values import object_schema

# Errors of any request: one that cannot be read, another host's or page's, limits of connections, a failure here.
_ANY = (400, 403, 431, 500)
# Of server-sent events: JSON, or [DONE] in the last.
_EVENT = record({"data": STRING})


def document(operations: Iterable[Operation], limits: Limits, version: str, keys: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1.

    Args:
        limits: ranges of fields are those that hold on this server.
        version: of the server.
        keys: whether it requires API keys.
    """
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = re.sub(r":\w+}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, limits, keys)
    components: dict[str, Any] = {"schemas": {"Error": ERROR}}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"mambakit: {limits.model}", "version": version},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, limits: Limits, keys: bool) -> dict[str, Any]:
    schemas = {"application/json": operation.result or STRING, "text/event-stream": _EVENT}
    ok = {media: {"schema": schemas.get(media, STRING)} for media in operation.media}
    guarded = keys and not operation.open
    statuses = sorted({*_ANY, *operation.statuses, *((401,) if guarded else ())})
    found: dict[str, Any] = {
        "operationId": operation_id(operation),
        "summary": operation.summary,
        "responses": {
            "200": {"description": "OK", "content": ok},
            **{str(status): _error(HTTPStatus(status).phrase) for status in statuses},
            "default": _error("Another error, in the same shape."),
        },
    }
    if operation.parameters:
        found["parameters"] = [
            {
                "name": parameter.name,
                "in": parameter.where,
                "required": parameter.where == "path",
                "description": parameter.about,
                "schema": dict(parameter.schema),
            }
            for parameter in operation.parameters
        ]
    if operation.fields is not None:
        schema = object_schema(operation.fields, limits) | _either(operation, limits)
        content = {"application/json": {"schema": schema}}
        found["requestBody"] = {"required": True, "content": content}
    if guarded:
        found["security"] = [{"key": []}]
    return found


def _either(operation: Operation, limits: Limits) -> dict[str, Any]:
    """What a schema says of fields of which one must be there."""
    fields, either = operation.fields or {}, operation.either
    required = {name: replace(fields[name], required=True).schema_for(limits) for name in either}
    others: dict[str, Any] = {name: {"type": "null"} for name in either} if operation.exclusive else {}
    branches = [{"required": [name], "properties": others | {name: schema}} for name, schema in required.items()]
    return {"anyOf": branches} if branches else {}


def operation_id(operation: Operation) -> str:
    """Such as ``post_v1_completions``."""
    words = re.findall(r"[a-z0-9]+", re.sub(r":\w+}", "}", operation.path))
    return "_".join([operation.method.lower(), *words])


def _error(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": description, "content": content}
