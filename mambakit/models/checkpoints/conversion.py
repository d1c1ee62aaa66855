"""`convert`: a checkpoint rewritten in another format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from mambakit.errors import CheckpointError, UsageError
from mambakit.models.auto import AutoModelForCausalLM, read_any_configuration
from mambakit.models.checkpoints.storage import read_headers, resolve, weight_files
from mambakit.models.checkpoints.table import format_named
from mambakit.models.quantization import is_quantized

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip


def convert(
    source: str | os.PathLike, target: str | os.PathLike, format: str, dtype: torch.dtype | None = None
) -> Path:
    """Write the checkpoint ``source`` to the folder ``target`` in ``format``; packed weights are unpacked.

    Args:
        source: hub id or folder, in any format.
        target: a folder that is new or empty.
        format: "transformers" or "original".
        dtype: of the weights; the source's when None. A_log, D and dt_proj.bias stay float32.

    Raises:
        ValueError: an unknown format, or a target that is not empty.
        CheckpointError: the source is a classifier, or has something that the format cannot hold.
    """
    target_format = format_named(format)
    target = Path(target)
    if not str(target).strip():
        raise UsageError("target is empty; name a new folder")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; name a new folder")
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty; name a new folder")
    folder = resolve(source)
    read_any_configuration(folder)
    heads = [name for name in read_headers(weight_files(folder)) if name.startswith("score.")]
    if heads:
        raise CheckpointError(f"{folder} holds a classifier ({heads[0]}), which convert would lose; load and save it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if is_quantized(model.config):
        model.dequantize()
    target_format.write(model, target)
    copy_tokenizer(folder, target)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files between two folders."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
