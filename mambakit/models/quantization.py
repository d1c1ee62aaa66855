"""Weight-only quantisation of a whole model: int8 or int4 weights, saved and loaded.

in_proj, x_proj, out_proj and the head are quantised: nearly all of what a step reads. The convolution, norms, A_log, D, dt_proj
(its rows are short) and the states stay in higher precision, and so do the embeddings, of which a step reads one row.

A quantised checkpoint is mambakit's own: transformers warns that it does not know its method, and would fill the layers with
random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mambakit.models.storage import CheckpointError, read_tensors, weight_files
from mambakit.modules.quantized_linear import QuantizedLinear

METHOD = "mambakit"
FORMATS = ("int8", "int4")
_LAYERS = ("in_proj", "x_proj", "out_proj")


def quantize(model: Any, format: str, group: int = 64) -> Any:
    """Replace ``model``'s large linear layers by quantised ones, in place; returns the model.

    Args:
        format: "int8" or "int4".
        group: numbers of a row that share a scale: 32, 64 or 128.

    Raises:
        ValueError: an unknown format or group, or layers that are not plain linear layers (adapters: merge them first).
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    targets = _targets(model)
    for parent, name in targets:
        layer = getattr(parent, name)
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, not a plain linear layer; merge adapters, or load the unquantised model"
            )
    for parent, name in targets:
        setattr(parent, name, QuantizedLinear.from_linear(getattr(parent, name), format, group))
    model.config.quantization_config = {"quant_method": METHOD, "format": format, "group": group}
    return model.eval()


def _targets(model: Any) -> list[tuple[Any, str]]:
    backbone = getattr(model, "backbone", model)
    targets = [(block.mixer, name) for block in backbone.layers for name in _LAYERS]
    return [*targets, (model, "lm_head")] if isinstance(getattr(model, "lm_head", None), nn.Module) else targets


def is_quantized(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def load_quantized(cls: Any, config: Any, folder: Path, name: str, dtype: Any) -> Any:
    """A model saved after `quantize`."""
    settings = config.quantization_config
    with torch.device("meta"):
        model = cls(config)
        for parent, child in _targets(model):
            old = getattr(parent, child)
            bias = old.bias is not None
            new = QuantizedLinear(old.in_features, old.out_features, settings["format"], settings["group"], bias)
            setattr(parent, child, new)
    files = weight_files(folder)
    stored = read_tensors(files)
    expected = model.state_dict()
    for key in sorted(expected.keys() | stored.keys()):
        shapes = [tuple(where[key].shape) if key in where else None for where in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{files[0]}: tensor {key} has shape {shapes[0]} in the file and {shapes[1]} in a {settings['format']} "
                f"{cls.__name__}; quantise the original checkpoint again"
            )
    model.load_state_dict(stored, assign=True)
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if dtype is not None:
        model.to(dtype)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = name
    return model.eval()
