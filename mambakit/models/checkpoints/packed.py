"""mambakit's format of packed weights: transformers' layout, with this package's ``quantization_config``.

A checkpoint holds the packed layers' ``data``, scales and lists, and every tensor that `quantize` leaves as it is.
Embeddings that are the packed head's rows are left out: they are computed from the head.

transformers does not know the format: it warns, and fills the layers with random numbers. `dequantize` makes a plain
model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import shown
from mambakit.models.checkpoints.format import Loading
from mambakit.models.checkpoints.plain import common_dtype, dtype_and_count, values_to_write, write_by_transformers
from mambakit.models.checkpoints.storage import StoredTensor, read_tensors, weight_files
from mambakit.models.quantization import (
    LAYERS,
    METHOD,
    PACKED_FORMATS,
    has_head,
    shares_table,
    targets_of,
)
from mambakit.modules.quantized_linear import QuantizedLinear

_BESIDE = ("scales", "starts", "columns", "values")  # stored beside a packed weight's `data`
_EMBEDDINGS = "embeddings.weight"
_FOLLOWED = {"dtype", "device_map"}  # of transformers' arguments


class PackedFormat:
    """`CheckpointFormat` of packed weights."""

    name = "packed"
    packed = True
    tokenizer_source = ""

    def detect(self, folder: Path, config_json: dict[str, Any]) -> bool:
        settings = config_json.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == METHOD

    def read_configuration(self, config_json: dict[str, Any], path: Path) -> dict[str, Any]:
        settings = config_json["quantization_config"]
        for name, choices in (("format", PACKED_FORMATS), ("group", (32, 64, 128))):
            if not any(type(settings.get(name)) is type(c) and settings[name] == c for c in choices):
                raise CheckpointError(
                    f"{path}: quantization_config.{name} is {shown(settings.get(name))}; it must be one of "
                    f"{', '.join(map(str, choices))}; correct it there or quantise the original checkpoint again"
                )
        return config_json

    def name_in_model(self, stored: str) -> str:
        return stored

    def name_in_file(self, name: str) -> str:
        return name

    def load(self, loading: Loading) -> Any:
        """The class that was saved, or a language model's base model, or a new classifier on it."""
        _require_arguments(loading)
        cls, config = loading.cls, loading.config
        files = weight_files(loading.folder)
        stored = read_tensors(files)
        only_head = config.tie_word_embeddings and "lm_head.data" in stored
        only_head = only_head and not any(key.endswith(_EMBEDDINGS) for key in stored)
        with torch.device("meta"):
            model = cls(config)
            if borrowed := only_head and not has_head(model):  # for the embeddings, which are its rows
                model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        stored = _named_as_in(model, stored)
        _pack_on_meta(model, config, stored)
        new_score = _check(model, config, stored, files[0], only_head)
        model.load_state_dict(stored, strict=False, assign=True)  # every name was checked
        for prefix, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                _check_lists(module, f"{files[0]}: {prefix}")
        dtype = loading.dtype
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
            model._init_weights(model.score)
            warnings.warn(f"{loading.name} holds no score.weight: it is drawn anew, and needs training", stacklevel=4)
        return model.to(_device(loading.kwargs.get("device_map"))).eval()

    def write(
        self,
        model: Any,
        folder: Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        state_dict = _stored_tensors(model, values_to_write(model, state_dict))
        write_by_transformers(model, folder, is_main_process, state_dict, *args, **options)

    def count(self, stored: str, tensor: StoredTensor, config: Any) -> tuple[str, int]:
        layer, _, part = stored.rpartition(".")
        kind = layer.rpartition(".")[2]
        if kind not in (*LAYERS, "lm_head") or part not in ("data", *_BESIDE):
            return dtype_and_count(tensor)
        columns = config.intermediate_size if kind in ("x_proj", "out_proj") else config.hidden_size
        return config.quantization_config["format"], 0 if part in _BESIDE else tensor.shape[0] * columns

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        """The norm's: most packed bytes are integers, and scales are float32."""
        return common_dtype({name: tensor for name, tensor in found.items() if name.endswith("norm_f.weight")})


def _stored_tensors(model: Any, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The tensors of a state dict that a checkpoint of ``model`` holds. None stands for all of the model's own.

    Raises:
        ValueError: plain weights for a model whose configuration says that they are packed.
    """
    plain = [name for name in state or () if name.endswith(tuple(f".{layer}.weight" for layer in LAYERS))]
    if plain:
        raise ValueError(
            f"state_dict holds a plain {plain[0]}, the model's weights are packed; call model.dequantize() first"
        )
    if not shares_table(model):
        return state
    state = model.state_dict() if state is None else state
    return {name: tensor for name, tensor in state.items() if not name.endswith(_EMBEDDINGS)}


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
    for parent, child in targets_of(model):
        old = getattr(parent, child)
        bias = old.bias is not None
        with torch.device("meta"):
            new = QuantizedLinear(old.in_features, old.out_features, settings["format"], settings["group"], bias)
        setattr(parent, child, new)
    for prefix, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        for part in ("columns", "values"):  # a lossless format's lists have the length that the file gives them
            listed = stored.get(f"{prefix}.{part}")
            if part in layer._buffers and listed is not None and listed.dim() == 1:
                layer.register_buffer(part, listed.new_empty(listed.shape, device="meta"))


def _check(model: Any, config: Any, stored: dict[str, Tensor], file: Path, only_head: bool) -> bool:
    """CheckpointError unless names and shapes fit; whether a classifier's head is missing, which is drawn anew."""
    expected = model.state_dict()
    if only_head:
        expected = {key: tensor for key, tensor in expected.items() if not key.endswith(_EMBEDDINGS)}
    new_score = "score.weight" not in stored and expected.pop("score.weight", None) is not None
    for key in sorted(expected.keys() | stored.keys()):
        shapes = [tuple(where[key].shape) if key in where else None for where in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{file}: tensor {key} has shape {shapes[0]} in the file and {shapes[1]} in a "
                f"{config.quantization_config['format']} {type(model).__name__}; quantise the original checkpoint again"
            )
    return new_score


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
    """CheckpointError unless a lossless weight's list points into the weight: kernels read where it says."""
    if layer.packed.exceptions is None:
        return
    starts, columns, values = layer.packed.exceptions
    whole = len(columns) == len(values) and starts[0] == 0 and starts[-1] == len(columns) and (starts.diff() >= 0).all()
    if not whole or (len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < layer.in_features)):
        raise CheckpointError(f"{where}: the list of single weights is damaged; pack the original checkpoint again")
