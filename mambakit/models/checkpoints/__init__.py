"""Checkpoints on disk: one module for each format, a table of them, and what reads and writes through the table.

`format.CheckpointFormat` is the contract of a format and `table.FORMATS` the table. Public names are imported when they
are first used.
"""

from typing import TYPE_CHECKING

from mambakit._lazy import lazy_names
from mambakit._versions import check_models

if TYPE_CHECKING:
    from mambakit.errors import CheckpointError
    from mambakit.models.checkpoints.conversion import convert, copy_tokenizer
    from mambakit.models.checkpoints.description import CheckpointInfo, describe
    from mambakit.models.checkpoints.loading import load_pretrained
    from mambakit.models.checkpoints.saving import save_gguf, save_original, save_pretrained
    from mambakit.models.checkpoints.storage import resolve

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "convert",
    "copy_tokenizer",
    "describe",
    "load_pretrained",
    "resolve",
    "save_gguf",
    "save_original",
    "save_pretrained",
]

check_models()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointError": "mambakit.errors",
        "CheckpointInfo": "mambakit.models.checkpoints.description",
        "convert": "mambakit.models.checkpoints.conversion",
        "copy_tokenizer": "mambakit.models.checkpoints.conversion",
        "describe": "mambakit.models.checkpoints.description",
        "load_pretrained": "mambakit.models.checkpoints.loading",
        "resolve": "mambakit.models.checkpoints.storage",
        "save_gguf": "mambakit.models.checkpoints.saving",
        "save_original": "mambakit.models.checkpoints.saving",
        "save_pretrained": "mambakit.models.checkpoints.saving",
    },
)
