"""The `CheckpointFormat` of llama.cpp's GGUF. A checkpoint is one file, and its path stands where a folder's would."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.format import Loading, require_whole_expand
from mambakit.models.checkpoints.gguf import names
from mambakit.models.checkpoints.gguf.blocks import PACKED, bytes_of, fits, numbers_of, packed_of
from mambakit.models.checkpoints.gguf.container import Header, Typed, Writable, read_header, write_file
from mambakit.models.checkpoints.gguf.types import F16, F32, WRITTEN, BlockType
from mambakit.models.checkpoints.gguf.vocabulary import written
from mambakit.models.checkpoints.packed_tensors import load_packed
from mambakit.models.checkpoints.plain import common_dtype, load_tensors
from mambakit.models.checkpoints.storage import StoredTensor
from mambakit.models.quantization import is_quantized, packed_format
from mambakit.modules.placement import stored_value

_BY_DTYPE = {type.dtype: name for name, (type, _) in WRITTEN.items() if type.dtype is not None}


class GGUFFormat:
    """`CheckpointFormat` of one file. Q8_0 and Q4_0 weights run as they are; other blocks are widened to float32."""

    name = "gguf"
    packed = False
    holds_tokenizers = True

    def detect(self, folder: Path, config_json: dict[str, Any]) -> bool:
        return "general.architecture" in config_json

    def read_configuration(self, config_json: dict[str, Any], path: Path) -> dict[str, Any]:
        return names.read_fields(read_header(path))

    def name_in_model(self, stored: str) -> str:
        return names.name_in_model(stored)

    def name_in_file(self, name: str) -> str:
        return names.name_in_file(name)

    def load(self, loading: Loading) -> Any:
        header = read_header(loading.folder)
        if is_quantized(loading.config):
            return load_packed(loading, _packed_tensors(header, loading.config), header.path)
        found = {
            names.name_in_model(stored): StoredTensor(
                names.shape_in_model(stored, place.shape), names.dtype_of(place.type), header.path, place.type.name
            )
            for stored, place in header.tensors.items()
        }
        return load_tensors(loading, self, found, lambda: dict(_plain_tensors(header)))

    def write(
        self, model: Any, folder: Path, *args: Any, type: str | None = None, tokenizer: Any = None, **options: Any
    ) -> None:
        """Write the file ``folder``.

        Args:
            type: of the large weights: F32, F16, BF16, Q8_0 or Q4_0; that of the model's dtype when None.
            tokenizer: transformers', to write with the model.
        """
        if given := [*map(repr, args), *options]:
            raise TypeError(f"GGUF has the options type and tokenizer; drop {', '.join(given)}")
        if packed_format(model) is not None:
            raise CheckpointError("GGUF is written from plain weights, the model's are packed; dequantize() it first")
        if not hasattr(model, "lm_head") or model.config.model_type not in names.FAMILIES:
            raise CheckpointError(
                f"GGUF holds causal language models ({', '.join(names.FAMILIES)}), not a {model.__class__.__name__} "
                f"({model.config.model_type})"
            )
        require_whole_expand(model.config, "GGUF")
        name = _BY_DTYPE.get(model.dtype) if type is None else type.upper()
        if name not in WRITTEN:
            raise ValueError(f"type is {type or model.dtype}; choose one of {', '.join(WRITTEN)}")
        large, number = WRITTEN[name]
        metadata: dict[str, Any] = {
            "general.architecture": names.ARCHITECTURE, "general.name": Path(model.config.name_or_path or folder).stem,
            "general.file_type": number, "general.quantization_version": 2, **names.written_fields(model.config),
            **written(tokenizer, model.config.vocab_size),
        }  # fmt: skip
        for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            id = getattr(model.config, f"{field}_token_id")
            if isinstance(id, int) and 0 <= id < model.config.vocab_size:
                metadata.setdefault(f"tokenizer.ggml.{key}_token_id", Typed("I", id))
        tensors: dict[str, Writable] = {}
        for key, tensor in model.state_dict().items():
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            type_ = _type_of(key, tuple(tensor.shape), large)
            shape = names.value_in_file(key, tensor).shape if not tensor.is_meta else tensor.shape
            tensors[names.name_in_file(key)] = (tuple(shape), type_, partial(_raw, model, key, tensor, type_))
        for key, bias in _missing_biases(model):
            tensors[names.name_in_file(key)] = (tuple(bias.shape), F32, partial(bytes_of, bias, F32))
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_file(folder, metadata, tensors)

    def count(self, stored: str, tensor: StoredTensor, config: Any) -> tuple[str, int]:
        return tensor.kind, torch.Size(tensor.shape).numel()

    def dtype(self, found: dict[str, StoredTensor]) -> torch.dtype:
        """The plain numbers' where all are plain; else float32, which blocks are widened to."""
        blocks = any(tensor.kind not in _BY_DTYPE.values() and tensor.kind != "F64" for tensor in found.values())
        return torch.float32 if blocks else common_dtype(found)


def _plain_tensors(header: Header) -> Any:
    for stored, place in header.tensors.items():
        value = numbers_of(torch.from_numpy(header.bytes_of(stored)), place.type, place.shape)
        yield names.name_in_model(stored), names.value_in_model(stored, value, header)


def _packed_tensors(header: Header, config: Any) -> dict[str, Tensor]:
    """The tensors that `mambakit.models.checkpoints.packed` reads, under its names."""
    settings = config.quantization_config
    others = settings.get("layers", {})
    tensors: dict[str, Tensor] = {}
    for stored, place in header.tensors.items():
        name = names.name_in_model(stored)
        if config.tie_word_embeddings and name.endswith("embeddings.weight"):
            name = "lm_head.weight" if others.get("lm_head") != "plain" else name
        layer = name.removesuffix(".weight")
        raw = torch.from_numpy(header.bytes_of(stored))
        large = layer != name and layer.rpartition(".")[2] in ("in_proj", "x_proj", "out_proj", "lm_head")
        if large and others.get(layer, settings["format"]) != "plain" and PACKED.get(place.type) is not None:
            if len(place.shape) != 2:
                raise CheckpointError(f"{header.path}: tensor {stored} has shape {place.shape}, it must have two")
            tensors |= {f"{layer}.{part}": t for part, t in packed_of(raw, place.type, place.shape).tensors().items()}
        else:
            value = names.value_in_model(stored, numbers_of(raw, place.type, place.shape), header)
            tensors[name] = value.float()
    return tensors


def _type_of(name: str, shape: tuple[int, ...], large: BlockType) -> BlockType:
    """Rows that are no whole blocks (dt_proj's, often) are float16, as llama.cpp has them."""
    if names.kept_plain(name, shape):
        return F32
    return large if shape[-1] % large.numbers == 0 else F16


def _raw(model: Any, name: str, tensor: Tensor, type: BlockType) -> bytes:
    value = names.value_in_file(name, stored_value(model, name, tensor).detach().cpu())
    if not torch.isfinite(value).all():
        raise CheckpointError(f"GGUF: {name} has numbers that are not finite")
    assert fits(value, type)
    raw = bytes_of(value, type)
    if type.dtype != torch.float32:
        peak = value.abs().max().item() if value.numel() else 0.0
        most = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}.get(type.name, float("inf"))
        if peak > most:
            raise CheckpointError(
                f"GGUF: {name} has {peak:g}, and {type.name} holds at most {most:g}; write BF16 or F32"
            )
    return raw


def _missing_biases(model: Any) -> Any:
    """Zeros for the convolution's bias, which llama.cpp asks for, where the model has none."""
    for index, block in enumerate(model.backbone.layers):
        if block.mixer.conv1d.bias is None:
            zeros = torch.zeros(block.mixer.conv1d.out_channels, dtype=torch.float32, device="cpu")
            yield f"backbone.layers.{index}.mixer.conv1d.bias", zeros
