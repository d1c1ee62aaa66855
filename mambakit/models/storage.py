"""Checkpoint files: where they are, and which tensors they hold. Nothing pickled is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.quoting import brief

# The arguments of from_pretrained that say where a checkpoint is.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
_SMALL = ["*.json", "*.txt", "*.model"]
_PATTERNS = [*_SMALL, "*.safetensors"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names the file, the tensor and the remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor."""

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


def small_files(name: str | os.PathLike, **hub: Any) -> Path:
    """The local folder of a checkpoint's configuration and tokenizer: like `resolve`, but no weights are fetched."""
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), {k: v for k, v in hub.items() if v is not None}, weights=False)
    return folder / subfolder


def _download(name: str, hub: dict[str, Any], weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS if weights else _SMALL, **hub))
        if weights and not list(folder.rglob("*.safetensors")) and not list(folder.rglob("*.bin")):
            folder = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "*.bin"], **hub))
    except HFValidationError as error:
        raise CheckpointError(f"{brief(name)} is neither a folder here nor a hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{brief(name)} is not a folder here, and the hub's cache does not hold it (revision "
            f"{hub.get('revision', 'main')!r}) while offline; download it once with a connection (and without "
            "HF_HUB_OFFLINE=1 and local_files_only)"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the hub has no readable {brief(name)} ({error}); check the id, the revision and your token"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; fetch the checkpoint again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before .bin, shards in the index's order."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} has no weight_map; fetch the checkpoint again")
            names = list(dict.fromkeys(weight_map.values()))
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
    with open(file, "rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if file.suffix != ".safetensors":
        return {name: StoredTensor(tuple(t.shape), t.dtype, file) for name, t in read_bin(file).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, a safe_open is no dict
            described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    for name, (_, dtype) in described.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {dtype}; mambakit reads {', '.join(_DTYPES)}")
    return {name: StoredTensor(shape, _DTYPES[dtype], file) for name, (shape, dtype) in described.items()}


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


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, without reading the others."""
    if file.suffix != ".safetensors":
        return read_bin(file)[name]
    from safetensors import safe_open

    with safe_open(file, "pt", device="cpu") as opened:
        return opened.get_tensor(name)


def read_bin(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, read with weights_only=True: tensors and containers, never code."""
    with open(file, "rb") as opened:
        start = opened.read(len(_LEGACY))
    zipped = start[: len(_ZIP)] == _ZIP
    if not zipped and start != _LEGACY:
        raise CheckpointError(f"{file} was not written by torch.save, or its start is damaged; fetch it again")
    try:
        if zipped and not zipfile.is_zipfile(file):
            raise EOFError("its end is missing")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds pickled code, or is damaged, and was not opened further; get the weights as safetensors, or from "
            "a source you trust"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} is not a state dict of tensors; save model.state_dict() alone")
    return state


_ZIP = b"PK\x03\x04"
# torch.save before 1.6: a pickle that begins with protocol 2 and this magic number.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# What torch's restricted unpickler raises over files cut short or with bytes overwritten.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
_POINTER = b"version https://git-lfs"
