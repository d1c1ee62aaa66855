"""`convert`: a checkpoint rewritten in another format; and how the commands that rewrite one load it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mambakit.errors import CheckpointError, UsageError
from mambakit.models.adapters import merge_adapters
from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer, model_place, read_any_configuration
from mambakit.models.checkpoints.storage import has_tokenizer, is_gguf, locate, read_headers, weight_files
from mambakit.models.checkpoints.table import format_named
from mambakit.models.quantization import is_quantized

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "preprocessor_config.json",
)  # fmt: skip


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    dtype: torch.dtype | str | None = None,
    tokenizer: bool = True,
) -> Path:
    """Write the checkpoint ``source`` to ``target`` in ``format``; packed weights are unpacked, adapters merged.

    Args:
        source: hub id, folder or GGUF file, in any format; or a folder of adapters.
        target: a folder that is new or empty; for "gguf" a new file.
        format: "transformers", "original" or "gguf".
        dtype: of the weights; the source's when None. A_log, D and dt_proj.bias stay float32. A GGUF file's may be
            "q8_0" or "q4_0", too.
        tokenizer: whether to write the source's tokenizer, where it has one.

    Raises:
        ValueError: an unknown format, or a target that is not empty.
        CheckpointError: the source is a classifier, or has something that the format cannot hold.
    """
    target_format = format_named(format)
    target = Path(target)
    _require_new(target, format)
    if isinstance(dtype, str) and format != "gguf":
        raise ValueError(f"dtype is {dtype!r}, which a GGUF file alone has; give a torch.dtype, or format 'gguf'")
    model, place = load_language_model(source, "convert", dtype if isinstance(dtype, torch.dtype) else "auto")
    if is_quantized(model.config):
        model.dequantize()
    if format == "gguf":
        type = dtype if isinstance(dtype, str) else None
        loaded = AutoTokenizer.from_pretrained(place) if tokenizer and has_tokenizer(place) else None
        target_format.write(model, target, type=type, tokenizer=loaded)
        return target
    target_format.write(model, target)
    if tokenizer:
        copy_tokenizer(place, target)
    return target


def load_language_model(source: str | os.PathLike, command: str, dtype: torch.dtype | str) -> tuple[Any, Path]:
    """The language model of a checkpoint, with its adapters merged, and the place that holds its tokenizer.

    Raises:
        CheckpointError: the checkpoint is of another architecture, or a classifier, whose head ``command`` would lose.
        ValueError: adapters that cannot be merged.
    """
    base = model_place(source)
    read_any_configuration(base)
    heads = [name for name in read_headers(weight_files(base)) if name.startswith("score.")]
    if heads:
        raise CheckpointError(f"{base} holds a classifier ({heads[0]}), which {command} would lose; load and save it")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if hasattr(model, "peft_config"):
        merge_adapters(model)
    place = locate(source)
    return model, place if has_tokenizer(place) else base


def _require_new(target: Path, format: str) -> None:
    """UsageError unless ``target`` can be written without replacing anything."""
    if not str(target).strip() or str(target) == ".":
        raise UsageError("target is empty; name a new folder")
    if format == "gguf":
        if target.suffix != ".gguf":
            raise UsageError(f"{target} is to be a GGUF file; give it a name that ends with .gguf")
        if target.exists():
            raise UsageError(f"{target} exists; name a new file")
    elif target.suffix == ".gguf":
        raise UsageError(f"{target} has a GGUF file's name; name a new folder, or convert to 'gguf'")
    elif target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; name a new folder")
    elif target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty; name a new folder")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files between two folders, or write those of a GGUF file's."""
    if is_gguf(source):
        if has_tokenizer(source):
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
        return
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
