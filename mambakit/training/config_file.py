"""A training configuration from a TOML file and ``key=value`` overrides."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path
from typing import Any, get_type_hints

from mambakit.errors import UsageError
from mambakit.quoting import brief
from mambakit.toml_files import read_toml
from mambakit.training.config import TrainConfig

# Fields of earlier releases, and what stands in their place.
_RENAMED = {"tensorboard": "report_to=tensorboard"}


def load_config(path: str | Path, overrides: list[str]) -> TrainConfig:
    """Read a TOML file and apply ``key=value`` overrides, values in Python's notation (bare words are strings)."""
    if "=" in str(path) and not Path(path).exists():
        raise UsageError(f"the first argument is {brief(str(path))}; give a configuration file before key=value")
    values = read_toml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"override {override!r} is not of the form key=value")
        if not text.strip():
            raise UsageError(f"{key.strip()}= is empty; give it a value, or leave it out (is a variable not set?)")
        values[key.strip()] = _literal(key.strip(), text.strip())
    return make_config(values, str(path))


def make_config(values: dict[str, Any], source: str) -> TrainConfig:
    hints = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in hints:
            if key in _RENAMED:
                raise UsageError(f"{source}: {key} is now {_RENAMED[key]}; write that")
            near = difflib.get_close_matches(key, hints, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{source}: unknown field {key!r}{meant}")
        values[key] = _typed(source, key, value, hints[key])
    return TrainConfig(**values)


def _typed(source: str, key: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    elif type(value) is hint:
        return value
    expected = "list of strings" if hint == list[str] else hint.__name__
    raise UsageError(f"{source}: {key} is {value!r}, expected a {expected}")


def _literal(key: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        if text.startswith("[") and text.endswith("]"):
            raise UsageError(
                f"{key}={brief(text)} is no list of strings, as a shell takes quotes away; quote the whole: "
                f'\'{key}=["a", "b"]\''
            ) from error
        return text
