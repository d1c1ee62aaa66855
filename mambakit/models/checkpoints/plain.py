"""Plain weights, in any layout: every tensor's name and shape is checked, then transformers loads or writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.models.checkpoints.format import CheckpointFormat, Loading
from mambakit.models.checkpoints.storage import StoredTensor, read_headers, read_tensor, read_tensors, weight_files
from mambakit.modules.placement import stored_value

_HEADS = ("lm_head.", "score.")


def load_plain(loading: Loading, format: CheckpointFormat) -> Any:
    """`CheckpointFormat.load` of plain weights. A weight that the files do not hold raises: none stays random."""
    config, folder = loading.config, loading.folder
    if getattr(config, "quantization_config", None) is not None or loading.kwargs.get("state_dict") is not None:
        # Names and shapes are those of the quantiser, or of the caller.
        return _load(loading, str(folder), **_with_dtype(loading))
    files = weight_files(folder)
    safe = loading.use_safetensors
    if safe is not None and safe != (files[0].suffix == ".safetensors"):
        raise CheckpointError(
            f"use_safetensors={safe}, but the weights of {folder} are {files[0].name}; convert them, or drop it"
        )
    found = read_headers(files)
    mapping = _mapping(loading, format, found)
    if files[0].suffix == ".safetensors" and all(stored == name for stored, name in mapping.items()):
        return _load(loading, str(folder), **_with_dtype(loading, format.dtype(found)))
    tensors = read_tensors(files)
    state = {name: tensors[stored] for stored, name in mapping.items()}
    return _load(loading, None, state_dict=state, **_with_dtype(loading, format.dtype(found)))


def load_tensors(
    loading: Loading, format: CheckpointFormat, found: dict[str, StoredTensor], read: Callable[[], dict[str, Tensor]]
) -> Any:
    """`load_plain` of tensors that are stored in another form.

    Args:
        found: the tensors as `read` will give them, under the names of a causal language model.
        read: gives them; called once names and shapes are checked.
    """
    mapping = _mapping(loading, format, found)
    tensors = read()
    state = {name: tensors[stored] for stored, name in mapping.items()}
    return _load(loading, None, state_dict=state, **_with_dtype(loading, format.dtype(found)))


def _with_dtype(loading: Loading, stored: torch.dtype | None = None) -> dict[str, Any]:
    """transformers' arguments with the dtype that the caller asks for: "auto" is the configuration's, or ``stored``.

    transformers would take the first tensor's, which may be A_log's float32.
    """
    kwargs = dict(loading.kwargs)
    if loading.dtype is not None:
        kwargs["dtype"] = loading.dtype
    if stored is not None and kwargs.get("dtype") in (None, "auto"):
        declared = getattr(loading.config, "dtype", None)
        kwargs["dtype"] = declared if isinstance(declared, torch.dtype) else stored
    return kwargs


def _load(loading: Loading, folder: str | None, **kwargs: Any) -> Any:
    load = super(_definer(loading.cls, "from_pretrained"), loading.cls).from_pretrained
    return load(folder, *loading.args, config=loading.config, **kwargs)


def write_by_transformers(
    model: Any,
    folder: Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **options: Any,
) -> None:
    """Write config.json, generation_config.json and safetensors by transformers' ``save_pretrained``.

    Args:
        state_dict: the tensors to write; the model's own when None.
        is_main_process, args, options: ``save_pretrained``'s.
    """
    state_dict = values_to_write(model, state_dict)
    write = super(_definer(type(model), "save_pretrained"), model).save_pretrained
    with _for_trained_weights(model.config):
        write(str(folder), is_main_process, state_dict, *args, **options)


def values_to_write(model: Any, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """``state_dict``, or the model's own where accelerate has offloaded weights.

    None where transformers can read the model's weights itself.
    """
    by_transformers = hasattr(model, "hf_device_map")  # it then reads offloaded weights
    if state_dict is None and not by_transformers and any(p.is_meta for p in model.parameters()):
        return {name: stored_value(model, name, t) for name, t in model.state_dict().items()}
    return state_dict


def common_dtype(found: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds most of the weights."""
    counts: dict[torch.dtype, int] = {}
    for tensor in found.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def dtype_and_count(tensor: StoredTensor) -> tuple[str, int]:
    """`CheckpointFormat.count` of a plain tensor."""
    return str(tensor.dtype).removeprefix("torch."), torch.Size(tensor.shape).numel()


@contextmanager
def _for_trained_weights(config: Any) -> Iterator[None]:
    """Within it ``config`` has the values that config.json must have beside trained weights.

    transformers (5.17 to 5.24) applies one field of initialisation to weights that it has loaded: where
    ``rescale_prenorm_residual`` is true, out_proj is divided by sqrt(layers) each time.
    """
    given = config.rescale_prenorm_residual
    config.rescale_prenorm_residual = False
    try:
        yield
    finally:
        config.rescale_prenorm_residual = given


def _definer(cls: Any, method: str) -> Any:
    """The class of mambakit that overrides transformers' ``method``."""
    return next(base for base in cls.__mro__ if method in vars(base) and base.__module__.startswith("mambakit."))


def _mapping(loading: Loading, format: CheckpointFormat, found: dict[str, StoredTensor]) -> dict[str, str]:
    """Stored name -> name in the class, for every tensor to load.

    Raises:
        CheckpointError: a tensor is unknown, missing, of another shape or not floating point, or has two names.
    """
    cls, config, folder = loading.cls, loading.config, loading.folder
    # The caller asked for new values where shapes differ.
    any_shape = loading.kwargs.get("ignore_mismatched_sizes", False)
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in cls(config).state_dict().items()}
    mapping, unexpected = {}, []
    for stored in found:
        name = _name_in_class(format.name_in_model(stored), expected)
        if name in expected:
            mapping[stored] = name
        elif not stored.startswith(_HEADS):
            unexpected.append(stored)
    if unexpected:
        name = unexpected[0]
        raise CheckpointError(
            f"{found[name].file}: tensor {name} (and {len(unexpected) - 1} more) is not part of {cls.__name__}; "
            f"config.json in {folder} is of another model, or the file is"
        )
    sources: dict[str, str] = {}
    for stored, name in mapping.items():
        file = found[stored].file
        if sources.setdefault(name, stored) != stored:
            raise CheckpointError(
                f"{file}: {sources[name]} and {stored} are two names of one tensor; remove one of them"
            )
        if not found[stored].dtype.is_floating_point:
            raise CheckpointError(
                f"{file}: tensor {stored} is {found[stored].dtype}, not floating point; quantised weights need a "
                "quantization_config in config.json"
            )
        if found[stored].shape != expected[name] and not any_shape:
            head = " (ignore_mismatched_sizes=True draws the head anew)" if name.startswith("score.") else ""
            raise CheckpointError(
                f"{file}: tensor {stored} has shape {found[stored].shape}, config.json asks for {expected[name]}; "
                f"correct config.json or fetch the matching weights{head}"
            )
    tied = config.tie_word_embeddings
    missing = sorted(
        name for name in expected.keys() - set(mapping.values())
        if not name.startswith("score.") and not (tied and name == "lm_head.weight")
    )  # fmt: skip
    if missing:
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} (and {len(missing) - 1} more) is missing from "
            f"{', '.join(sorted({t.file.name for t in found.values()}))}; fetch the checkpoint again"
        )
    _check_tied_head(config, found, mapping)
    return mapping


def _name_in_class(name: str, expected: dict[str, Any]) -> str:
    """A causal language model's ``name`` as the class has it: a base model has no backbone's prefix."""
    if name in expected:
        return name
    base = name.removeprefix("backbone.")
    return base if base in expected else "backbone." + name


def _check_tied_head(config: Any, found: dict[str, StoredTensor], mapping: dict[str, str]) -> None:
    """CheckpointError where a head is stored beside embeddings that it is tied to, and is no copy of them."""
    embeddings = next((stored for stored, name in mapping.items() if name.endswith("embeddings.weight")), None)
    head = found.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None or embeddings is None:
        return
    if not torch.equal(read_tensor(head.file, "lm_head.weight"), read_tensor(found[embeddings].file, embeddings)):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from {embeddings}, but config.json says they are tied; set "
            "tie_word_embeddings to false to keep both, or remove lm_head.weight"
        )
