"""Checkpoints with packed weights: what they hold, and loading them.

Beside the packed layers' `data`, scales and lists a checkpoint holds what `quantize` leaves as it is, except embeddings that are
the packed head's rows: the head is enough.

The format is mambakit's own: transformers warns that it does not know its method, and would fill the layers with random numbers.
`dequantize` makes a plain model of it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.models.checkpoints.formats import read_generation_config
from mambakit.models.checkpoints.storage import CheckpointError, read_tensors, weight_files
from mambakit.models.mamba.initialization import initialize
from mambakit.models.quantization import LAYERS, has_head, is_quantized, shares_table, targets_of
from mambakit.modules.quantized_linear import QuantizedLinear

_BESIDE = ("scales", "starts", "columns", "values")  # stored beside a packed weight's `data`
_EMBEDDINGS = "embeddings.weight"
_FOLLOWED = {"dtype", "device_map"}  # of transformers' arguments


def stored_tensors(model: Any, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a state dict (None: the model's, as it is) a checkpoint of ``model`` holds.

    Raises:
        ValueError: plain weights for a model whose configuration says that they are packed.
    """
    plain = [name for name in state or () if name.endswith(tuple(f".{layer}.weight" for layer in LAYERS))]
    if plain and is_quantized(model.config):
        raise ValueError(
            f"state_dict holds a plain {plain[0]}, the model's weights are packed; call model.dequantize() first"
        )
    if not shares_table(model):
        return state
    state = model.state_dict() if state is None else state
    return {name: tensor for name, tensor in state.items() if not name.endswith(_EMBEDDINGS)}


def packed_weights(name: str, shape: tuple[int, ...], config: Any) -> tuple[str, int] | None:
    """(format, how many weights) of a stored tensor that is part of a packed weight, none if they count elsewhere; or None."""
    layer, _, part = name.rpartition(".")
    kind = layer.rpartition(".")[2]
    if not is_quantized(config) or kind not in (*LAYERS, "lm_head") or part not in ("data", *_BESIDE):
        return None
    columns = config.intermediate_size if kind in ("x_proj", "out_proj") else config.hidden_size
    return config.quantization_config["format"], 0 if part in _BESIDE else shape[0] * columns


def require_packed_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError where `from_pretrained` of packed weights is asked for what only plain ones can be."""
    given = {k for k, v in kwargs.items() if v is not None and v is not False and not k.startswith("_")}
    refused = sorted(given - _FOLLOWED) + [repr(a) for a in args]
    if refused:
        raise ValueError(
            f"this checkpoint's weights are packed, and {', '.join(refused)} cannot be followed there, only {' and '.join(sorted(_FOLLOWED))}; "
            "drop the argument, or unpack the checkpoint first (mambakit convert)"
        )


def load_quantized(
    cls: Any,
    config: Any,
    folder: Path,
    name: str,
    dtype: Any,
    device_map: Any,
    generation: Any = None,
) -> Any:
    """A model saved after `quantize`: the class that was saved, or a language model's base model, or a new classifier on it."""
    settings = config.quantization_config
    files = weight_files(folder)
    stored = read_tensors(files)
    only_head = config.tie_word_embeddings and "lm_head.data" in stored
    only_head = only_head and not any(key.endswith(_EMBEDDINGS) for key in stored)
    with torch.device("meta"):
        model = cls(config)
        if borrowed := only_head and not has_head(model):  # for the embeddings, which are its rows
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parent, child in targets_of(model):
            old = getattr(parent, child)
            bias = old.bias is not None
            new = QuantizedLinear(old.in_features, old.out_features, settings["format"], settings["group"], bias)
            setattr(parent, child, new)
    stored = _named_as_in(model, stored)
    layers = {prefix: module for prefix, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for prefix, layer in layers.items():
        for part in ("columns", "values"):  # a lossless format's lists have the length that the file gives them
            listed = stored.get(f"{prefix}.{part}")
            if part in layer._buffers and listed is not None and listed.dim() == 1:
                layer.register_buffer(part, listed.new_empty(listed.shape, device="meta"))
    expected = model.state_dict()
    if only_head:
        expected = {key: tensor for key, tensor in expected.items() if not key.endswith(_EMBEDDINGS)}
    new_score = "score.weight" not in stored and expected.pop("score.weight", None) is not None
    for key in sorted(expected.keys() | stored.keys()):
        shapes = [tuple(where[key].shape) if key in where else None for where in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{files[0]}: tensor {key} has shape {shapes[0]} in the file and {shapes[1]} in a {settings['format']} "
                f"{cls.__name__}; quantise the original checkpoint again"
            )
    model.load_state_dict(stored, strict=False, assign=True)  # every name has been looked at
    for prefix, layer in layers.items():
        _check_lists(layer, f"{files[0]}: {prefix}")
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if dtype is not None:
        model.to(dtype)
    dtype = getattr(model, "backbone", model).norm_f.weight.dtype
    if only_head:
        model.get_input_embeddings().weight = nn.Parameter(model.lm_head.packed.dequantized().to(dtype))
    if borrowed:
        del model.lm_head
    if new_score:
        model.score = nn.Linear(config.hidden_size, config.num_labels, bias=False, dtype=dtype)
        initialize(model.score, config)
        warnings.warn(f"{name} holds no score.weight: it is drawn anew, and needs training", stacklevel=4)
    generation = read_generation_config(folder) if generation is None else generation
    if model.can_generate() and generation is not None:
        model.generation_config = generation
    model.config.name_or_path = model.name_or_path = name
    return model.to(_device(device_map)).eval()


def _named_as_in(model: Any, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under ``model``'s names, without those of heads that it does not have."""
    base = not isinstance(getattr(model, "backbone", None), nn.Module)
    named = {}
    for name, tensor in stored.items():
        head = name.partition(".")[0]
        if head not in ("lm_head", "score"):
            name = name.removeprefix("backbone.")
            named[name if base else "backbone." + name] = tensor
        elif isinstance(getattr(model, head, None), nn.Module):
            named[name] = tensor
    return named


def _device(device_map: Any) -> Any:
    """The one device of transformers' ``device_map``."""
    if isinstance(device_map, dict):
        places = list(dict.fromkeys(device_map.values()))
        if len(places) != 1:
            raise ValueError(f"device_map names {len(places)} devices; a quantised model lies on one")
        return places[0]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else None
    return device_map


def _check_lists(layer: QuantizedLinear, where: str) -> None:
    """What the kernels rely on in a lossless weight's list: they read where it says."""
    if layer.packed.exceptions is None:
        return
    starts, columns, values = layer.packed.exceptions
    whole = len(columns) == len(values) and starts[0] == 0 and starts[-1] == len(columns) and (starts.diff() >= 0).all()
    if not whole or (len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < layer.in_features)):
        raise CheckpointError(f"{where}: the list of single weights is damaged; pack the original checkpoint again")
