"""The model that ships with mambakit; its card is README.md in its folder."""

from __future__ import annotations

from pathlib import Path

_NAME = "books"


def default_model_path() -> Path:
    """Folder of the embedded model.

    Raises:
        FileNotFoundError: this installation lacks it.
    """
    folder = Path(__file__).parent / _NAME
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is not in {folder}; install mambakit again, or name a model")
    return folder
