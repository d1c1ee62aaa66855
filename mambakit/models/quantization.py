"""Packed weights for a whole model, saved and loaded: int8 or int4, or the same numbers in fewer bits.

in_proj, x_proj, out_proj and the head are packed: nearly all of what a step reads. The convolution, norms, A_log, D, dt_proj
(its rows are short) and the states stay as they are, and so do the embeddings, of which a step reads one row.

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
from mambakit.ops.linear import lossless

METHOD = "mambakit"
FORMATS = ("int8", "int4", "lossless")
_LAYERS = ("in_proj", "x_proj", "out_proj")
_BESIDE = ("scales", "starts", "columns", "values")  # stored beside a packed weight's `data`


def quantize(model: Any, format: str, group: int = 64) -> Any:
    """Replace ``model``'s large linear layers by quantised ones, in place; returns the model.

    Args:
        format: "int8" or "int4"; or "lossless", which keeps every number to the last bit: bfloat16 in 12 bits, float32 in 28.
        group: numbers of a row that share a scale: 32, 64 or 128.

    Raises:
        ValueError: an unknown format or group, layers that are not plain linear layers (adapters: merge them first), or
            lossless packing of a model in neither float32 nor bfloat16.
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
    if format == "lossless":
        format = _lossless_format({getattr(parent, name).weight.dtype for parent, name in targets})
    for parent, name in targets:
        setattr(parent, name, QuantizedLinear.from_linear(getattr(parent, name), format, group))
    model.config.quantization_config = {"quant_method": METHOD, "format": format, "group": group}
    return model.eval()


def _lossless_format(dtypes: set[torch.dtype]) -> str:
    for format, dtype in lossless.DTYPES.items():
        if dtypes == {dtype}:
            return format
    names = ", ".join(sorted(str(d) for d in dtypes))
    raise ValueError(
        f"lossless packing takes a model in float32 or in bfloat16; these weights are {names}: cast the model"
    )


def _targets(model: Any) -> list[tuple[Any, str]]:
    backbone = getattr(model, "backbone", model)
    targets = [(block.mixer, name) for block in backbone.layers for name in _LAYERS]
    return [*targets, (model, "lm_head")] if isinstance(getattr(model, "lm_head", None), nn.Module) else targets


def is_quantized(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def packed_weights(name: str, shape: tuple[int, ...], config: Any) -> tuple[str, int] | None:
    """(format, how many weights) of a stored tensor that is part of a packed weight, none if they count elsewhere; or None."""
    layer, _, part = name.rpartition(".")
    kind = layer.rpartition(".")[2]
    if not is_quantized(config) or kind not in (*_LAYERS, "lm_head") or part not in ("data", *_BESIDE):
        return None
    columns = config.intermediate_size if kind in ("x_proj", "out_proj") else config.hidden_size
    return config.quantization_config["format"], 0 if part in _BESIDE else shape[0] * columns


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
    for prefix, module in model.named_modules():
        if isinstance(
            module, QuantizedLinear
        ):  # the lists of a lossless format have the length that the file gives them
            for name in ("columns", "values"):
                listed = stored.get(f"{prefix}.{name}")
                if name in module._buffers and listed is not None and listed.dim() == 1:
                    module.register_buffer(name, listed.new_empty(listed.shape, device="meta"))
    expected = model.state_dict()
    for key in sorted(expected.keys() | stored.keys()):
        shapes = [tuple(where[key].shape) if key in where else None for where in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{files[0]}: tensor {key} has shape {shapes[0]} in the file and {shapes[1]} in a {settings['format']} "
                f"{cls.__name__}; quantise the original checkpoint again"
            )
    model.load_state_dict(stored, assign=True)
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _check_lists(module, f"{files[0]}: {prefix}")
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if dtype is not None:
        model.to(dtype)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = name
    return model.eval()


def _check_lists(layer: QuantizedLinear, where: str) -> None:
    """What the kernels rely on in a lossless weight's list: they read where it says."""
    if layer.packed.exceptions is None:
        return
    starts, columns, values = layer.packed.exceptions
    whole = len(columns) == len(values) and starts[0] == 0 and starts[-1] == len(columns) and (starts.diff() >= 0).all()
    if not whole or (len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < layer.in_features)):
        raise CheckpointError(f"{where}: the list of single weights is damaged; pack the original checkpoint again")
