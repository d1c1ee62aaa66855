"""The model of `mambakit serve`, before it is loaded."""

from __future__ import annotations

from pathlib import Path

from mambakit.errors import CheckpointError
from mambakit.quoting import brief


def own_name(model: str) -> str:
    """A folder's name, a GGUF file's without its ending, or the hub id."""
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else model


def check_model(name: str) -> None:
    """Refuse a folder that is missing or holds no model before the port is open; the replica checks the rest."""
    folder = Path(name)
    if folder.suffix == ".gguf" and folder.is_file():
        return
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise CheckpointError(
                f"there is no config.json in {brief(name)}; give a folder that holds a model, or a hub id"
            )
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise CheckpointError(f"there is no folder {brief(name)}; give a folder that holds a model, or a hub id")
