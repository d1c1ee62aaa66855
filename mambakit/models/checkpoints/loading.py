"""Loading checked checkpoints, saving in either format, converting and describing."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mambakit.errors import UsageError
from mambakit.models.checkpoints.formats import is_original, read_config, read_generation_config, to_original_fields
from mambakit.models.checkpoints.packed import load_quantized, packed_weights, require_packed_arguments
from mambakit.models.checkpoints.storage import (
    HUB_ARGUMENTS,
    CheckpointError,
    StoredTensor,
    read_headers,
    read_json,
    read_tensor,
    read_tensors,
    resolve,
    weight_files,
)
from mambakit.models.quantization import is_quantized
from mambakit.modules.placement import stored_value
from mambakit.quoting import brief

__all__ = ["CheckpointError", "CheckpointInfo", "convert", "describe", "load_pretrained", "save_original"]

_HEADS = ("lm_head.", "score.")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model",
)  # fmt: skip


def load_pretrained(cls: Any, name: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any) -> Any:
    """`cls.from_pretrained`: check every tensor's name and shape first, then load. Nothing is left at random values."""
    folder = resolve(name, **{key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs})
    generation = kwargs.pop("generation_config", None)
    safe = kwargs.pop("use_safetensors", None)
    # Taken out first: a configuration would take the argument for its own field.
    dtype, older = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    if config is None:
        config, kwargs = read_config(folder, cls.config_class, **kwargs)
    elif isinstance(config, (str, os.PathLike)):
        config, _ = read_config(resolve(config), cls.config_class)
    if dtype is not None:
        kwargs["dtype"] = dtype
    if is_quantized(config):
        require_packed_arguments(args, kwargs)
        return load_quantized(cls, config, folder, str(name), dtype, kwargs.get("device_map"), generation)
    load = super(_owner(cls), cls).from_pretrained
    if getattr(config, "quantization_config", None) is not None or kwargs.get("state_dict") is not None:
        return load(
            str(folder), *args, config=config, **kwargs
        )  # names and shapes are the quantiser's, or the caller's
    files = weight_files(folder)
    if safe is not None and safe != (files[0].suffix == ".safetensors"):
        raise CheckpointError(
            f"use_safetensors={safe}, but the weights of {folder} are {files[0].name}; convert them, or drop it"
        )
    found = read_headers(files)
    mapping = _check(cls, config, found, folder, kwargs.get("ignore_mismatched_sizes", False))
    if kwargs.get("dtype") in (
        None,
        "auto",
    ):  # transformers would take the first tensor's, which may be A_log's float32
        declared = getattr(config, "dtype", None)
        kwargs["dtype"] = declared if isinstance(declared, torch.dtype) else _common_dtype(found)
    if files[0].suffix == ".safetensors" and all(stored == wanted for stored, wanted in mapping.items()):
        result = load(str(folder), *args, config=config, **kwargs)
    else:
        tensors = read_tensors(files)
        state = {wanted: tensors[stored] for stored, wanted in mapping.items()}
        result = load(None, *args, config=config, state_dict=state, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    generation = read_generation_config(folder) if generation is None else generation
    if model.can_generate() and generation is not None:
        model.generation_config = generation
    model.config.name_or_path = model.name_or_path = str(name)
    return result


def _owner(cls: Any) -> Any:
    """The class that defines our from_pretrained: the one to go past."""
    return next(base for base in cls.__mro__ if "from_pretrained" in vars(base))


def _common_dtype(found: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds most of the weights."""
    counts: dict[torch.dtype, int] = {}
    for tensor in found.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _check(
    cls: Any, config: Any, found: dict[str, StoredTensor], folder: Path, any_shape: bool = False
) -> dict[str, str]:
    """Stored name -> name in ``cls``, for every tensor to load; raises where the two do not fit.

    ``any_shape`` is transformers' ``ignore_mismatched_sizes``: the caller asked for new values where shapes differ.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in cls(config).state_dict().items()}
    mapping, unexpected = {}, []
    for stored in found:
        wanted = _translate(stored, expected)
        if wanted in expected:
            mapping[stored] = wanted
        elif not stored.startswith(_HEADS):
            unexpected.append(stored)
    if unexpected:
        name = unexpected[0]
        raise CheckpointError(
            f"{found[name].file}: tensor {name} (and {len(unexpected) - 1} more) is not part of {cls.__name__}; config.json "
            f"in {folder} is of another model, or the file is"
        )
    sources: dict[str, str] = {}
    for stored, wanted in mapping.items():
        if sources.setdefault(wanted, stored) != stored:
            raise CheckpointError(
                f"{found[stored].file}: {sources[wanted]} and {stored} are two names of one tensor; remove one of them"
            )
        if not found[stored].dtype.is_floating_point:
            raise CheckpointError(
                f"{found[stored].file}: tensor {stored} is {found[stored].dtype}, not floating point; quantised weights "
                "need a quantization_config in config.json"
            )
        if found[stored].shape != expected[wanted] and not any_shape:
            head = " (ignore_mismatched_sizes=True draws the head anew)" if wanted.startswith("score.") else ""
            raise CheckpointError(
                f"{found[stored].file}: tensor {stored} has shape {found[stored].shape}, config.json asks for "
                f"{expected[wanted]}; correct config.json or fetch the matching weights{head}"
            )
    tied = config.tie_word_embeddings
    missing = [
        name for name in expected.keys() - set(mapping.values())
        if not name.startswith("score.") and not (tied and name == "lm_head.weight")
    ]  # fmt: skip
    if missing:
        name = sorted(missing)[0]
        raise CheckpointError(
            f"{folder}: tensor {name} (and {len(missing) - 1} more) is missing from "
            f"{', '.join(sorted({t.file.name for t in found.values()}))}; fetch the checkpoint again"
        )
    _check_tied_head(config, found, mapping)
    return mapping


def _translate(stored: str, expected: dict[str, Any]) -> str:
    """A stored name as the class calls it: the original embedding's name, with or without the backbone's prefix."""
    name = stored.replace("embedding.weight", "embeddings.weight")
    if name in expected:
        return name
    if name.removeprefix("backbone.") in expected:
        return name.removeprefix("backbone.")
    return "backbone." + name


def _check_tied_head(config: Any, found: dict[str, StoredTensor], mapping: dict[str, str]) -> None:
    """A head stored beside embeddings it is said to be tied to must be a copy of them, or one would be lost."""
    embeddings = next((s for s, w in mapping.items() if w.endswith("embeddings.weight")), None)
    head = found.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None or embeddings is None:
        return
    if not torch.equal(read_tensor(head.file, "lm_head.weight"), read_tensor(found[embeddings].file, embeddings)):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from {embeddings}, but config.json says they are tied; set "
            "tie_word_embeddings to false to keep both, or remove lm_head.weight"
        )


# -- out ---------------------------------------------------------------------------------------------------------------


def save_original(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write a causal language model in state-spaces' format: config.json and pytorch_model.bin.

    That format has no field for the ids of special tokens (they are 0). Where the model's differ, generation_config.json
    is written beside it: `from_pretrained` reads it, state-spaces' own loader passes over it.

    Raises:
        CheckpointError: the model has something that the format cannot say.
    """
    if is_quantized(model.config):
        raise CheckpointError("the original format holds plain weights, the model's are packed; dequantize() it first")
    folder = Path(folder)
    fields = to_original_fields(model.config)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        values = stored_value(model, name, tensor)
        state[name.replace("embeddings.weight", "embedding.weight")] = values.detach().cpu().contiguous()
    if "lm_head.weight" not in state:
        raise CheckpointError(f"the original format holds causal language models, not a {type(model).__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", lambda path: path.write_text(json.dumps(fields, indent=2), encoding="utf-8"))
    _write(folder / "pytorch_model.bin", lambda path: torch.save(state, path))
    generation = getattr(model, "generation_config", None)
    if generation is not None and (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) != (
        0,
        0,
        0,
    ):
        generation.save_pretrained(folder)


def _write(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def convert(
    source: str | os.PathLike, target: str | os.PathLike, format: str, dtype: torch.dtype | None = None
) -> Path:
    """Write the checkpoint ``source`` (id or folder, either format) to the folder ``target`` in ``format``; packed weights are
    unpacked.

    Args:
        format: "transformers" or "original".
        dtype: of the weights; the source's when None. A_log, D and dt_proj.bias stay float32.
    """
    from mambakit.models.auto import AutoModelForCausalLM

    if format not in ("transformers", "original"):
        raise ValueError(f"format is {brief(format)}; choose 'transformers' or 'original'")
    target = Path(target)
    if not str(target).strip():
        raise UsageError("target is empty; name a new folder")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; name a new folder")
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty; name a new folder")
    folder = resolve(source)
    read_config(folder)
    heads = [name for name in read_headers(weight_files(folder)) if name.startswith("score.")]
    if heads:
        raise CheckpointError(f"{folder} holds a classifier ({heads[0]}), which convert would lose; load and save it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if is_quantized(model.config):
        model.dequantize()
    if format == "original":
        save_original(model, target)
    else:
        model.save_pretrained(target)
    copy_tokenizer(folder, target)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files between two folders."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, from its headers alone."""

    name: str
    folder: str
    format: str
    architecture: str
    config: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    """Parameters of each dtype."""
    files: dict[str, int]
    """Bytes of each weight file."""
    state_bytes: int
    """Bytes of the state of one sequence."""
    tokenizer: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(name: str | os.PathLike, **hub: Any) -> CheckpointInfo:
    """Read what a checkpoint is without loading its weights."""
    folder = resolve(name, **hub)
    config, _ = read_config(folder)
    original = is_original(read_json(folder / "config.json"))
    files = weight_files(folder)
    found = read_headers(files)
    embeddings = any(stored.endswith(("embeddings.weight", "embedding.weight")) for stored in found)
    tied_copy = config.tie_word_embeddings and embeddings
    dtypes: dict[str, int] = {}
    for stored, tensor in found.items():
        if tied_copy and stored in ("lm_head.weight", "lm_head.data"):
            continue
        key, count = packed_weights(stored, tensor.shape, config) or (
            str(tensor.dtype).removeprefix("torch."), torch.Size(tensor.shape).numel()
        )  # fmt: skip
        if count:
            dtypes[key] = dtypes.get(key, 0) + count
    # Of packed weights most bytes are integers, and the scales float32: the norm is in the model's own dtype.
    plain = {n: t for n, t in found.items() if n.endswith("norm_f.weight")} if is_quantized(config) else found
    fields: tuple[str, ...] = (
        "hidden_size",
        "num_hidden_layers",
        "state_size",
        "expand",
        "conv_kernel",
        "time_step_rank",
        "vocab_size",
    )
    fields += ("use_bias", "use_conv_bias", "tie_word_embeddings")
    return CheckpointInfo(
        name=str(name), folder=str(folder), format="original" if original else "transformers",
        architecture="FalconMamba" if config.model_type == "falcon_mamba" else "Mamba",
        config={field: getattr(config, field) for field in fields},
        parameters=sum(dtypes.values()), dtypes=dtypes, files={f.name: f.stat().st_size for f in files},
        state_bytes=config.state_spec(_common_dtype(plain)).nbytes, tokenizer=(folder / "tokenizer.json").is_file(),
    )  # fmt: skip
