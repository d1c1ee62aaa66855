"""Checkpoint files as they lie on disk: where they are, what configuration they hold, which tensors they have.

Two layouts are read: transformers' (`config.json` with ``model_type``; safetensors or .bin, single or sharded), and the
original one of state-spaces (`config.json` with ``d_model``; `pytorch_model.bin`). Nothing pickled is ever executed.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.models.configuration import FalconMambaConfig, MambaConfig

CONFIGS: dict[str, Any] = {"mamba": MambaConfig, "falcon_mamba": FalconMambaConfig}
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names the file, the tensor and the remedy."""


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def resolve(name: str | os.PathLike, **hub: Any) -> Path:
    """The local folder of a checkpoint: a folder itself, or a hub id through huggingface_hub's cache.

    Args:
        name: a folder, or a hub id ("state-spaces/mamba-130m-hf").
        hub: revision, cache_dir, token, local_files_only, force_download, subfolder.
    """
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_file():
            raise CheckpointError(f"{name} is a file; give the folder that holds it and its config.json")
        folder = _download(str(name), {k: v for k, v in hub.items() if v is not None})
    folder = folder / subfolder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"there is no config.json in {folder}; give a folder that holds a model, or a hub id")
    return folder


def _download(name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS, **hub))
        if not list(folder.rglob("*.safetensors")) and not list(folder.rglob("*.bin")):
            folder = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "*.bin"], **hub))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder here nor a hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is not a folder here, and the hub's cache does not hold it while offline; "
            "download it once with a connection (and without HF_HUB_OFFLINE=1)"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the hub has no readable {name!r} ({error}); check the id, the revision and your token"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error


def is_original(fields: dict[str, Any]) -> bool:
    return "model_type" not in fields and "d_model" in fields


def read_config(folder: Path, config_class: Any = None, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """(configuration, the keyword arguments that are not fields of it)."""
    path = folder / "config.json"
    fields = read_json(path)
    if is_original(fields):
        fields = from_original_fields(fields, path)
    model_type = fields.get("model_type")
    if model_type not in CONFIGS:
        raise CheckpointError(f"{path}: model_type is {model_type!r}; mambakit loads {' and '.join(CONFIGS)}")
    chosen = CONFIGS[model_type]
    if config_class is not None and not issubclass(chosen, config_class):
        wanted = config_class.model_type
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}, this class loads {wanted!r}; use AutoModelForCausalLM, or the class "
            f"of that architecture"
        )
    config, unused = chosen.from_dict(fields, return_unused_kwargs=True, **overrides)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    return config, unused


# -- the original format's configuration -------------------------------------------------------------------------------

_SSM = {
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank",
    "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_scale": "time_step_scale", "dt_init": "time_step_init_scheme",
    "dt_init_floor": "time_step_floor", "conv_bias": "use_conv_bias", "bias": "use_bias",
}  # fmt: skip
_IGNORED = {"fused_add_norm", "use_fast_path"}  # ways to compute, not what is computed


def from_original_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers' configuration fields for a state-spaces config.json."""
    unsupported = {
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
    }  # fmt: skip
    for key, value in unsupported.items():
        if fields.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{path}: {key} is {fields[key]!r}; mambakit loads pure Mamba-1 models ({key} = {value!r})"
            )
    ssm = dict(fields.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise CheckpointError(f"{path}: ssm_cfg.layer is {layer!r}; mambakit loads Mamba1")
    multiple = fields.get("pad_vocab_size_multiple", 8)
    result = {
        "model_type": "mamba",
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "vocab_size": -(-fields.get("vocab_size", 50277) // multiple) * multiple,
        "residual_in_fp32": fields.get("residual_in_fp32", True),
        "tie_word_embeddings": fields.get("tie_embeddings", True),
        "rescale_prenorm_residual": True,
    }
    for key, value in ssm.items():
        if key in _SSM:
            result[_SSM[key]] = value
        elif key not in _IGNORED:
            raise CheckpointError(
                f"{path}: ssm_cfg.{key} = {value!r} is not a field of Mamba-1; remove it if it has no effect"
            )
    known = {*unsupported, *_IGNORED, "ssm_cfg", "d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"}
    known |= {"residual_in_fp32", "tie_embeddings"}
    for key in fields.keys() - known:
        raise CheckpointError(
            f"{path}: {key} = {fields[key]!r} is not a field of Mamba-1; remove it if it has no effect"
        )
    return result


def to_original_fields(config: Any) -> dict[str, Any]:
    """state-spaces' config.json for a configuration; it has no field for what it cannot say."""
    if config.model_type != "mamba":
        raise CheckpointError(f"the original format holds Mamba models only, not {config.model_type!r}")
    if config.layer_norm_epsilon != 1e-5 or config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(
            f"the original format has no field for layer_norm_epsilon {config.layer_norm_epsilon} (it is 1e-5) and "
            f"hidden_act {config.hidden_act!r} (it is silu); save in transformers' format"
        )
    ssm = {theirs: getattr(config, ours) for theirs, ours in _SSM.items()}
    return {
        "d_model": config.hidden_size, "d_intermediate": 0, "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size, "ssm_cfg": {"layer": "Mamba1", **ssm}, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


# -- tensors -----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before .bin, shards in the index's order."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = list(dict.fromkeys(read_json(folder / index).get("weight_map", {}).values()))
            for name in names:
                if not (folder / name).is_file():
                    raise CheckpointError(
                        f"{folder / index} names {name}, which is not there; fetch the checkpoint again"
                    )
            return [folder / name for name in names]
    raise CheckpointError(f"there are no weights in {folder} (model.safetensors or pytorch_model.bin)")


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Name -> shape, dtype and file of every stored tensor, without reading safetensors' data."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _headers(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in {found[name].file.name} and in {file.name}; remove one of the files"
                )
            found[name] = tensor
    return found


def _headers(file: Path) -> dict[str, StoredTensor]:
    if file.suffix != ".safetensors":
        return {name: StoredTensor(tuple(t.shape), t.dtype, file) for name, t in read_bin(file).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, a safe_open is no dict
            return {n: StoredTensor(tuple(s.get_shape()), _DTYPES[s.get_dtype()], file) for n, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again") from error


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_file(file) if file.suffix == ".safetensors" else read_bin(file))
    return tensors


def read_bin(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, read with weights_only=True: tensors and containers, never code."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds pickled code, or is damaged, and was not opened further; get the weights as safetensors, or from "
            "a source you trust"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} is not a state dict of tensors; save model.state_dict() alone")
    return state


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"
