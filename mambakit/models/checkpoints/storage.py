"""A checkpoint's files: where they are, and which tensors they hold. `mambakit.reading` opens them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError, UsageError
from mambakit.quoting import brief
from mambakit.reading import open_safetensors, read_bin, read_file, read_header, read_json

__all__ = [
    "HUB_ARGUMENTS", "CheckpointError", "StoredTensor", "has_tokenizer", "holds_adapters", "is_gguf", "locate",
    "read_bin", "read_config", "read_headers", "read_json", "read_tensor", "read_tensors", "resolve", "small_files",
    "weight_files",
]  # fmt: skip

# The arguments of from_pretrained that say where a checkpoint is.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder", "gguf_file")
_SMALL = ["*.json", "*.txt", "*.model"]
_PATTERNS = [*_SMALL, "*.safetensors"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    kind: str = ""
    """GGUF's name of how the numbers are stored."""


def is_gguf(place: str | os.PathLike) -> bool:
    """Whether a checkpoint's place is a GGUF file, which stands where the others' folders do."""
    return Path(place).suffix == ".gguf" and not Path(place).is_dir()


def resolve(name: str | os.PathLike, **hub: Any) -> Path:
    """The local folder of a checkpoint: a folder itself, or a hub id through huggingface_hub's cache.

    Args:
        name: a folder, or a hub id ("state-spaces/mamba-130m-hf"); or a GGUF file, here or on the hub
            ("owner/name/file.gguf").
        hub: revision, cache_dir, token, local_files_only, force_download, subfolder; ``gguf_file``, the name of a GGUF
            file in the folder or on the hub.
    """
    folder = locate(name, **hub)
    if is_gguf(folder):
        return folder
    if holds_adapters(folder):
        raise CheckpointError(
            f"{folder} holds adapters, not a model; AutoModelForCausalLM.from_pretrained loads them on their base "
            "model, and mambakit convert merges them"
        )
    if not (folder / "config.json").exists():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        remedy = f"name the file ({folder / files[0]})" if files else "give a folder that holds a model, or a hub id"
        raise CheckpointError(f"there is no config.json in {folder}; {remedy}")
    return folder


def locate(name: str | os.PathLike, **hub: Any) -> Path:
    """As `resolve`, of a folder with any contents."""
    if (file := _gguf(name, hub)) is not None:
        return file
    _require_names(name, hub)
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), {k: v for k, v in hub.items() if v is not None})
    return folder / subfolder


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds PEFT's adapters and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def read_config(place: Path) -> tuple[dict[str, Any], Path]:
    """What a checkpoint's config.json holds (a GGUF file's metadata), and the file that it is in."""
    if is_gguf(place):
        from mambakit.models.checkpoints.gguf.container import read_header

        return read_header(place).metadata, place
    return read_json(place / "config.json"), place / "config.json"


def _gguf(name: Any, hub: dict[str, Any]) -> Path | None:
    """The GGUF file that a checkpoint's name and ``gguf_file`` mean; None where they mean none.

    Raises:
        CheckpointError: it is neither here nor on the hub.
    """
    file = hub.pop("gguf_file", None)
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        return None  # `_require_names` refuses it
    if file is not None and not (isinstance(file, (str, os.PathLike)) and str(file).strip()):
        raise UsageError(f"gguf_file is {brief(file)}; give the name of a file in the folder or on the hub")
    if file is None and Path(name).suffix != ".gguf":
        return None
    if file is None and Path(name).is_dir():
        return None
    path = Path(name) if file is None else Path(name) / (hub.get("subfolder") or "") / file
    if path.is_file():
        return path
    if Path(name).is_absolute() or Path(name).is_dir() or str(name).startswith((".", "~")):
        raise CheckpointError(f"there is no file {path}; give a .gguf file, a folder that holds a model, or a hub id")
    if file is None:
        owner, _, rest = str(name).partition("/")
        repository, _, file = rest.partition("/")
        name = f"{owner}/{repository}"
        if not file:
            raise CheckpointError(
                f"there is no file {path}; give one that is here, or one on the hub (owner/name/file.gguf)"
            )
    return _fetched(str(name), {k: v for k, v in hub.items() if v is not None}, str(file))


def _require_names(name: Any, hub: dict[str, Any]) -> None:
    """UsageError where a name is empty: an unset shell variable must not mean the current folder or a default."""
    if not isinstance(name, (str, os.PathLike)):
        raise UsageError(f"a checkpoint is named by a folder or a hub id, not by {name!r}")
    if not str(name).strip():
        raise UsageError(f"the name of a checkpoint is empty ({str(name)!r}); give a folder or a hub id")
    if Path(name).is_file():
        raise CheckpointError(f"{name} is a file; give the folder that holds it and its config.json")
    for key in ("revision", "cache_dir", "token"):
        value = hub.get(key)
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"{key} is empty ({value!r}); give it a value, or leave it out")


def small_files(name: str | os.PathLike, **hub: Any) -> Path:
    """The local folder of a checkpoint's configuration and tokenizer: like `resolve`, but no weights are fetched."""
    if (file := _gguf(name, hub)) is not None:
        return file
    _require_names(name, hub)
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), {k: v for k, v in hub.items() if v is not None}, weights=False)
    return folder / subfolder


def _download(name: str, hub: dict[str, Any], weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    with _named_by_hub(name, hub):
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS if weights else _SMALL, **hub))
        if weights and not list(folder.rglob("*.safetensors")) and not list(folder.rglob("*.bin")):
            folder = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "*.bin"], **hub))
    return folder


def _fetched(name: str, hub: dict[str, Any], file: str) -> Path:
    """One file of the hub's ``name``."""
    from huggingface_hub import hf_hub_download

    with _named_by_hub(name, hub):
        return Path(hf_hub_download(name, file, **hub))


@contextmanager
def _named_by_hub(name: str, hub: dict[str, Any]) -> Iterator[None]:
    """What the hub's library raises within becomes a `CheckpointError` that names the checkpoint and the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
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


def has_tokenizer(place: Path) -> bool:
    """Whether a checkpoint holds a tokenizer."""
    if is_gguf(place):
        return read_config(place)[0].get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    return (place / "tokenizer.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before .bin, shards in the index's order; a GGUF file itself."""
    if is_gguf(folder):
        return [folder]
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
            names = list(dict.fromkeys(map(str, weight_map.values())))
            for name in names:
                if Path(name).name != name:
                    raise CheckpointError(f"{folder / index} names {name!r}, which is no file of its folder")
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
        if is_gguf(file):
            found.update(_gguf_headers(file))
            continue
        for name, (shape, dtype) in read_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in {found[name].file.name} and in {file.name}; remove one of the files"
                )
            found[name] = StoredTensor(shape, dtype, file)
    return found


def _gguf_headers(file: Path) -> dict[str, StoredTensor]:
    from mambakit.models.checkpoints.gguf.container import read_header as read_gguf

    return {
        name: StoredTensor(place.shape, place.type.dtype or torch.uint8, file, place.type.name)
        for name, place in read_gguf(file).tensors.items()
    }


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_file(file))
    return tensors


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, without reading safetensors' others."""
    if file.suffix != ".safetensors":
        return read_file(file)[name]
    with open_safetensors(file) as opened:
        return opened.get_tensor(name)
