"""`save_pretrained`, `save_original` and `save_gguf`: write a model's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mambakit.models.checkpoints.table import format_named, format_of


def save_pretrained(model: Any, folder: str | os.PathLike, *args: Any, **options: Any) -> None:
    """Write ``model`` in transformers' format, or in mambakit's own where its weights are packed.

    Args:
        args, options: transformers' of ``save_pretrained``.
    """
    folder = Path(folder)
    format_of(folder, model.config.to_dict()).write(model, folder, *args, **options)


def save_original(model: Any, folder: str | os.PathLike) -> None:
    """Write a causal language model in state-spaces' original format.

    Raises:
        CheckpointError: the model has something that the format cannot hold.
    """
    format_named("original").write(model, Path(folder))


def save_gguf(model: Any, file: str | os.PathLike, type: str | None = None, tokenizer: Any = None) -> None:
    """Write a causal language model as a GGUF file, for llama.cpp.

    Args:
        type: of the large weights: F32, F16, BF16, Q8_0 or Q4_0; that of the model's dtype when None.
        tokenizer: transformers', to write with the model.

    Raises:
        CheckpointError: the model or the tokenizer has something that the format cannot hold.
    """
    format_named("gguf").write(model, Path(file), type=type, tokenizer=tokenizer)
