"""mambakit's format of packed weights: transformers' layout, with this package's ``quantization_config``.

A checkpoint holds the packed layers' ``data``, scales and lists, and every tensor that `quantize` leaves as it is.
Embeddings that are the packed head's rows are left out: they are computed from the head.

transformers does not know the format: it warns, and fills the layers with random numbers. `dequantize` makes a plain
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.fields import shown
from mambakit.models.checkpoints.format import Loading
from mambakit.models.checkpoints.packed_tensors import EMBEDDINGS, load_packed
from mambakit.models.checkpoints.plain import common_dtype, dtype_and_count, values_to_write, write_by_transformers
from mambakit.models.checkpoints.storage import StoredTensor, read_tensors, weight_files
from mambakit.models.quantization import (
    LAYERS,
    METHOD,
    PACKED_FORMATS,
    format_of_layer,
    shares_table,
)
from mambakit.modules.quantized_linear import QuantizedLinear

_BESIDE = ("scales", "starts", "columns", "values")  # stored beside a packed weight's `data`


class PackedFormat:
    """`CheckpointFormat` of packed weights."""

    name = "packed"
    packed = True
    holds_tokenizers = True

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
        others = settings.get("layers", {})
        if not isinstance(others, dict) or not all(v in (*PACKED_FORMATS, "plain") for v in others.values()):
            raise CheckpointError(
                f"{path}: quantization_config.layers is {shown(others)}; it must give each layer one of "
                f"{', '.join(PACKED_FORMATS)} or plain; correct it there or quantise the original checkpoint again"
            )
        return config_json

    def name_in_model(self, stored: str) -> str:
        return stored

    def name_in_file(self, name: str) -> str:
        return name

    def load(self, loading: Loading) -> Any:
        """The class that was saved, or a language model's base model, or a new classifier on it."""
        files = weight_files(loading.folder)
        return load_packed(loading, read_tensors(files), files[0])

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
        return format_of_layer(config, layer), 0 if part in _BESIDE else tensor.shape[0] * columns

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        """The norm's: most packed bytes are integers, and scales are float32."""
        return common_dtype({name: tensor for name, tensor in found.items() if name.endswith("norm_f.weight")})


def _stored_tensors(model: Any, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The tensors of a state dict that a checkpoint of ``model`` holds. None stands for all of the model's own.

    Raises:
        ValueError: plain weights for a model whose configuration says that they are packed.
    """
    weights = [name for name in state or () if name.endswith(tuple(f".{layer}.weight" for layer in LAYERS))]
    plain = [name for name in weights if format_of_layer(model.config, _whole_name(name)) != "plain"]
    if plain:
        raise ValueError(
            f"state_dict holds a plain {plain[0]}, the model's weights are packed; call model.dequantize() first"
        )
    if not shares_table(model) or not isinstance(model.lm_head, QuantizedLinear):
        return state
    state = model.state_dict() if state is None else state
    return {name: tensor for name, tensor in state.items() if not name.endswith(EMBEDDINGS)}


def _whole_name(name: str) -> str:
    """The name of a weight's layer in a causal language model."""
    return "backbone." + name.removeprefix("backbone.").removesuffix(".weight")
