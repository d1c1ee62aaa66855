"""The table of checkpoint formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambakit.models.checkpoints.format import CheckpointFormat
from mambakit.models.checkpoints.gguf.format import GGUFFormat
from mambakit.models.checkpoints.original import OriginalFormat
from mambakit.models.checkpoints.packed import PackedFormat
from mambakit.models.checkpoints.transformers import TransformersFormat
from mambakit.quoting import brief

# In the order in which they are tried; the last one takes what no other does, so that its errors name what is missing.
FORMATS: tuple[CheckpointFormat, ...] = (GGUFFormat(), OriginalFormat(), PackedFormat(), TransformersFormat())
PLAIN = tuple(format.name for format in FORMATS if not format.packed)[::-1]
"""Names of the formats that `convert` writes; the default first."""


def format_of(folder: Path, config_json: dict[str, Any]) -> CheckpointFormat:
    """The format of ``folder``, whose config.json holds ``config_json``."""
    return next(format for format in FORMATS if format.detect(folder, config_json))


def format_named(name: str) -> CheckpointFormat:
    """The plain format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PLAIN:
        raise ValueError(f"format is {brief(name)}; choose {' or '.join(map(repr, PLAIN))}")
    return next(format for format in FORMATS if format.name == name)
