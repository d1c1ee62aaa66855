"""`save_pretrained`, `save_original` and `save_gguf`: write a model's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mambakit.errors import CheckpointError
from mambakit.models.adapters import adapted_layer, save_adapters
from mambakit.models.checkpoints.table import format_named, format_of
from mambakit.models.quantization import require_described
from mambakit.writing import require_folder_place


def save_pretrained(model: Any, folder: str | os.PathLike, *args: Any, **options: Any) -> None:
    """Write ``model`` in transformers' format, or in mambakit's own where its weights are packed. Of a model with
    adapters these alone are written, as PEFT does: `from_pretrained` of the folder loads their base model, too.

    Args:
        args, options: transformers' of ``save_pretrained``.

    Raises:
        UsageError: the folder, or what it is in, is a file.
        ValueError: a layer is packed otherwise than the configuration says.
    """
    require_folder_place(folder)
    folder = Path(folder)
    if adapted_layer(model) is not None:
        main = args[0] if args else True
        state_dict = args[1] if len(args) > 1 else None  # Trainer gives the model's own
        if len(args) > 2 or options:
            given = ", ".join(options) or "what follows state_dict"
            raise ValueError(f"adapters are saved without options; drop {given}, or merge_adapters first")
        if main:
            save_adapters(model, folder, state_dict)
        return
    require_described(model)
    format_of(folder, model.config.to_dict()).write(model, folder, *args, **options)


def save_original(model: Any, folder: str | os.PathLike) -> None:
    """Write a causal language model in state-spaces' original format.

    Raises:
        CheckpointError: the model has something that the format cannot hold.
        UsageError: the folder, or what it is in, is a file.
    """
    _require_no_adapters(model)
    require_folder_place(folder)
    format_named("original").write(model, Path(folder))


def save_gguf(model: Any, file: str | os.PathLike, type: str | None = None, tokenizer: Any = None) -> None:
    """Write a causal language model as a GGUF file, for llama.cpp.

    Args:
        type: of the large weights: F32, F16, BF16, Q8_0 or Q4_0; that of the model's dtype when None.
        tokenizer: transformers', to write with the model.

    Raises:
        CheckpointError: the model or the tokenizer has something that the format cannot hold.
    """
    _require_no_adapters(model)
    format_named("gguf").write(model, Path(file), type=type, tokenizer=tokenizer)


def _require_no_adapters(model: Any) -> None:
    if (layer := adapted_layer(model)) is not None:
        raise CheckpointError(f"{layer} has an adapter, which the format cannot hold; merge_adapters(model) first")
