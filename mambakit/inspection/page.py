"""The page of an inspection: one HTML file that needs nothing else, light or dark as its reader's system is."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

from torch import Tensor

from mambakit.inspection.summary import Summary


def page(found: Summary, model: str) -> str:
    """HTML text; ``model`` is the name above it."""
    data: dict[str, Any] = {
        "model": model,
        "summary": found.words,
        "pieces": found.pieces,
        "surprise": [round(value, 3) for value in found.surprise],
        "maps": {
            name: {
                "title": map.title, "data": _bytes(map.values), "columns": map.values.shape[1], "width": map.width,
                "low": map.low, "high": map.high, "log": map.log,
            }
            for name, map in found.maps.items()
        },
        "half_life": [[round(value, 4) for value in row] for row in found.half_life],
        "attention": {},
    }  # fmt: skip
    for layer, map in found.attention.items():
        data["attention"][str(layer)] = {
            "data": _bytes(map.values), "size": len(map.values), "width": map.width,
            "channels": found.channels[layer],
        }  # fmt: skip
    template = resources.files("mambakit.inspection").joinpath("page.html").read_text(encoding="utf-8")
    # Text of users inside a script element must not end it.
    encoded = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return template.replace("@DATA@", encoded)


def _bytes(values: Tensor) -> str:
    """Values of 0 to 1 as bytes, row by row, in base64."""
    return base64.b64encode((values * 255).round().byte().numpy().tobytes()).decode("ascii")
