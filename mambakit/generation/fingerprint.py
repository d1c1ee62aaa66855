"""The identity of a model for saved states: a hash of its weights and of the settings that change its results."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mambakit.decoding.cuda_graph import Placement, placement_of
from mambakit.modules.mixers import computation_fields
from mambakit.modules.placement import stored_value

_known: weakref.WeakKeyDictionary[Any, tuple[tuple[str, list], str]] = weakref.WeakKeyDictionary()
# The latest result, with a check that takes a tenth of the time: a prefix cache asks before every prompt.
_lately: weakref.WeakKeyDictionary[Any, tuple[Placement, list[int], str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """64 hexadecimal digits that name a model: SHA-256 of every weight's name, shape and values, and of the settings of
    its configuration that change what they compute.

    Equal for equal values, whatever their floating dtype and device: a checkpoint loaded in bfloat16 and the same one
    widened to float32 are one model. Computed once, and again after the weights have changed (about a second for each
    gigabyte and processor core).
    """
    config = json.dumps(computation_fields(model.config), sort_keys=True)
    placement = placement_of(model)
    lately = _lately.get(model)
    if lately is not None and lately[:3] == (placement, placement.versions(), config):
        return lately[3]
    found = _fingerprint(model, config)
    _lately[model] = placement, placement.versions(), config, found
    return found


def _fingerprint(model: Any, config: str) -> str:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():  # hooks untie them
        if (
            name in tensors
            and other in tensors
            and (tensors[name].is_meta or torch.equal(tensors[name], tensors[other]))
        ):
            del tensors[name]
    # These change when a tensor is replaced or written in place.
    versions = [(name, t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in tensors.items()]
    known = _known.get(model)
    if known is None or known[0] != (config, versions):
        total = hashlib.sha256(config.encode())
        names = sorted(tensors)

        def digest(name: str) -> bytes:
            return _digest(stored_value(model, name, tensors[name]))

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
            for name, found in zip(names, pool.map(digest, names), strict=True):
                total.update(f"{name}:".encode() + found)
        known = _known[model] = ((config, versions), total.hexdigest())
    return known[1]


def _digest(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        narrow = tensor.float()
        # Numbers that only float64 holds are hashed as such.
        tensor = narrow if tensor.dtype != torch.float64 or torch.equal(narrow.double(), tensor) else tensor
    digest = hashlib.sha256(f"{tuple(tensor.shape)}:".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
