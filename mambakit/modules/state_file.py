"""A state in a safetensors file: its tensors, and which model it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import CheckpointError
from mambakit.modules.state_spec import StateSpec
from mambakit.reading import open_safetensors
from mambakit.writing import replacing, require_place

_FORMAT = "mambakit.MambaCache/1"  # of every specification: the format is older than the others
_AGAIN = "save the state again"


@dataclass(frozen=True)
class SavedState:
    """What a file holds.

    Attributes:
        tensors: by `Stack.key`, (layers, b, *shape).
        slots: b.
        seen_tokens: token columns read.
        dtype: the dtype of the model that wrote it.
    """

    tensors: dict[str, Tensor]
    slots: int
    seen_tokens: int
    dtype: torch.dtype


def write_state(path: str | os.PathLike, tensors: Mapping[str, Any], spec: StateSpec, seen_tokens: int) -> None:
    """Write a state under a temporary name first, then rename it."""
    from safetensors.torch import save_file

    metadata = {
        "format": _FORMAT,
        "config": json.dumps(spec.model),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "seen_tokens": str(seen_tokens),
    }
    require_place(path)
    with replacing(path) as temporary:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)


def read_state(path: str | os.PathLike, specify: Callable[[torch.dtype | None], StateSpec]) -> SavedState:
    """Read a file of `write_state`, or of a version that named no dtype.

    Args:
        specify: the reader's specification in a dtype, its configuration's for None.

    Raises:
        ValueError: the file belongs to a model of another configuration.
        CheckpointError: it is not a saved state, or is damaged.
    """
    with open_safetensors(path, _AGAIN) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a saved mambakit state (format {metadata.get('format')!r})")
        try:
            saved, seen = json.loads(metadata["config"]), int(metadata["seen_tokens"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: its description of the state is damaged; {_AGAIN}") from error
        spec = specify(None)
        _require_same_model(path, saved if isinstance(saved, dict) else {}, spec.model)
        tensors = {stack.key: file.get_tensor(stack.key) for stack in spec.stacks}
    for stack in spec.stacks:
        tensor = tensors[stack.key]
        if tensor.dim() != 2 + len(stack.tensor.shape):
            raise CheckpointError(
                f"{path}: {stack.key} {tuple(tensor.shape)} is not of (layers, slots, *{stack.tensor.shape}); {_AGAIN}"
            )
    first = next(iter(tensors.values()), None)
    dtype = getattr(torch, metadata["dtype"], None) if "dtype" in metadata else None if first is None else first.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{path}: a state of {metadata.get('dtype', dtype)} is none of a model; {_AGAIN}")
    return SavedState(tensors, 0 if first is None else first.shape[1], seen, dtype or spec.dtype)


def _require_same_model(path: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [f"{k}: file {theirs.get(k)!r}, model {v!r}" for k, v in ours.items() if theirs.get(k) != v]
    if different:
        raise ValueError(f"{path} was saved by a model of another configuration ({'; '.join(different)})")
