"""A model whose weights are packed, made from tensors that a file holds: `load_packed`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.format import Loading
from mambakit.models.quantization import format_of_layer, has_head, named_targets
from mambakit.modules.quantized_linear import QuantizedLinear

EMBEDDINGS = "embeddings.weight"
_FOLLOWED = {"dtype", "device_map"}  # of transformers' arguments


def load_packed(loading: Loading, stored: dict[str, Tensor], file: Path) -> Any:
    """A model with packed weights.

    Args:
        stored: its tensors, under the names that this format gives them; without embeddings that are the packed head's
            rows.
        file: for errors.
    """
    _require_arguments(loading)
    cls, config = loading.cls, loading.config
    only_head = config.tie_word_embeddings and "lm_head.data" in stored
    only_head = only_head and not any(key.endswith(EMBEDDINGS) for key in stored)
    with torch.device("meta"):
        model = cls(config)
        if borrowed := only_head and not has_head(model):  # for the embeddings, which are its rows
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    stored = _named_as_in(model, stored)
    plain_head = config.tie_word_embeddings and has_head(model) and format_of_layer(config, "lm_head") == "plain"
    if plain_head:
        stored = {
            "lm_head.weight": stored.get(f"backbone.{EMBEDDINGS}", torch.empty(0, dtype=torch.float32, device="cpu")),
            **stored,
        }
    _pack_on_meta(model, config, stored)
    new_score = _check(model, config, stored, file, only_head)
    model.load_state_dict(stored, strict=False, assign=True)  # every name was checked
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _check_lists(module, f"{file}: {prefix}")
    dtype = loading.dtype
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if dtype is not None:
        model.to(dtype)
    dtype = getattr(model, "backbone", model).norm_f.weight.dtype
    if only_head:
        model.get_input_embeddings().weight = nn.Parameter(model.lm_head.packed.dequantized().to(dtype))
    elif plain_head:
        model.lm_head.weight = model.get_input_embeddings().weight
    if borrowed:
        del model.lm_head
    if new_score:
        model.score = nn.Linear(config.hidden_size, config.num_labels, bias=False, dtype=dtype)
        model._init_weights(model.score)
        warnings.warn(f"{loading.name} holds no score.weight: it is drawn anew, and needs training", stacklevel=5)
    return model.to(_device(loading.kwargs.get("device_map"))).eval()


def _require_arguments(loading: Loading) -> None:
    """ValueError where ``from_pretrained`` was given arguments that only plain weights can follow."""
    given = {k for k, v in loading.kwargs.items() if v is not None and v is not False and not k.startswith("_")}
    refused = sorted(given - _FOLLOWED) + [repr(a) for a in loading.args]
    if refused:
        raise ValueError(
            f"this checkpoint's weights are packed, and {', '.join(refused)} cannot be followed there, only "
            f"{' and '.join(sorted(_FOLLOWED))}; drop the argument, or unpack the checkpoint first (mambakit convert)"
        )


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


def _pack_on_meta(model: Any, config: Any, stored: dict[str, Tensor]) -> None:
    """Replace the packed layers of ``model``, which is on meta, by empty ones that fit ``stored``."""
    settings = config.quantization_config
    for name, parent, child in named_targets(model):
        old, format = getattr(parent, child), format_of_layer(config, name)
        if format == "plain":
            continue
        bias = old.bias is not None
        with torch.device("meta"):
            new = QuantizedLinear(old.in_features, old.out_features, format, settings["group"], bias)
        setattr(parent, child, new)
    for prefix, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        for part in ("columns", "values"):  # a lossless format's lists have the length that the file gives them
            listed = stored.get(f"{prefix}.{part}")
            if part in layer._buffers and listed is not None and listed.dim() == 1:
                layer.register_buffer(part, listed.new_empty(listed.shape, device="meta"))


def _check(model: Any, config: Any, stored: dict[str, Tensor], file: Path, only_head: bool) -> bool:
    """CheckpointError unless names, shapes and the dtypes of packed numbers fit; whether a classifier's head is
    missing, which is drawn anew."""
    expected = model.state_dict()
    if only_head:
        expected = {key: tensor for key, tensor in expected.items() if not key.endswith(EMBEDDINGS)}
    packed = {f"{prefix}.{part}" for prefix, m in model.named_modules() if isinstance(m, QuantizedLinear)
              for part in m._buffers}  # fmt: skip
    new_score = "score.weight" not in stored and expected.pop("score.weight", None) is not None
    for key in sorted(expected.keys() | stored.keys()):
        kinds = [_kind(where.get(key), key in packed) for where in (stored, expected)]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{file}: tensor {key} has shape {kinds[0]} in the file and {kinds[1]} in a "
                f"{config.quantization_config['format']} {type(model).__name__}; quantise the original checkpoint again"
            )
    return new_score


def _kind(tensor: Tensor | None, is_packed: bool) -> str:
    """What must fit: a tensor's shape, and its dtype where that is a part of the format."""
    if tensor is None:
        return "None"
    return f"{tuple(tensor.shape)} of {tensor.dtype}" if is_packed else f"{tuple(tensor.shape)}"


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
    """CheckpointError unless a lossless weight's list points into the weight: kernels read where it says; and for an
    fp8 weight with a NaN, which kernels read as 480."""
    if layer.format == "fp8" and layer.data.device.type != "meta":
        if (layer.data & 127 == 127).any():
            raise CheckpointError(f"{where}: an fp8 weight is not a number; quantise the original checkpoint again")
        return
    if layer.packed.exceptions is None:
        return
    starts, columns, values = layer.packed.exceptions
    whole = len(columns) == len(values) and starts[0] == 0 and starts[-1] == len(columns) and (starts.diff() >= 0).all()
    if not whole or (len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < layer.in_features)):
        raise CheckpointError(f"{where}: the list of single weights is damaged; pack the original checkpoint again")
