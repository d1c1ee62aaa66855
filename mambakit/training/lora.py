"""PEFT adapters, under the name that training has for them; `mambakit.models.adapters` holds the functions."""

from __future__ import annotations

from mambakit.models.adapters import add_adapters, load_adapters, merge_adapters, save_adapters

__all__ = ["add_adapters", "load_adapters", "merge_adapters", "save_adapters"]
