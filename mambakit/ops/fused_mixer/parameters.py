"""A layer's parameters as its kernels read them, in one launch (`parameters.cu`).

Under autocast float32 weights are rounded to half at every call, as torch's autocast does at the first call of each of
its contexts. A copy that outlived the call would have to know of every write to the weight: an optimiser's through
``.data``, a captured graph's, FSDP's and functional_call's other tensors. The launch costs a layer a few microseconds
and is never wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.launch_list import Item, Place, structure_item
from mambakit.ops._backends.structures import structure

MOST = 6  # tensors that one launch rounds
_EACH = 8 * 256  # elements of a CTA
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NUMBERS = range(MOST)
Params = structure(
    "Params",
    " ".join([*(f"from{i}" for i in _NUMBERS), "A_log", *(f"to{i}" for i in _NUMBERS), "A"]),
    " ".join([*(f"end{i}" for i in _NUMBERS), *(f"n{i}" for i in _NUMBERS), "states"]),
)


@functools.cache
def _module(dtype: torch.dtype, device: int) -> nvrtc.Module:
    return nvrtc.Module(Path(__file__).parent, "parameters.cu", {"DTYPE": _DTYPES[dtype]}, device)


BiasParams = structure("BiasParams", "bias to", "count channels")


class PreparedBias:
    """A bias in each of so many rows, to which a product is added: (rows, channels)."""

    def __init__(self, rows: int, channels: int, dtype: torch.dtype, device: int):
        self._kernel = _module(dtype, device).kernel("mixer_bias")
        self._parameters = BiasParams(count=rows * channels, channels=channels)
        self._grid = -(-rows * channels // _EACH)

    def items(self, bias: Place, to: Place) -> list[Item]:
        return [structure_item(self._kernel, self._grid, 256, self._parameters, {"bias": bias, "to": to})]


class PreparedParameters:
    """The launch for tensors of these sizes.

    Args:
        counts: elements of each tensor that is rounded to ``dtype``, at most `MOST`.
        states: elements of A_log.
    """

    def __init__(self, counts: list[int], states: int, dtype: torch.dtype, device: int):
        self._kernel = _module(dtype, device).kernel("mixer_parameters")
        self._parameters = parameters = Params(states=states)
        end = 0
        for i in _NUMBERS:
            count = counts[i] if i < len(counts) else 0
            end += -(-count // _EACH)
            setattr(parameters, f"n{i}", count)
            setattr(parameters, f"end{i}", end)
        self._grid = end + -(-states // 256)
        self._names = [(f"from{i}", f"to{i}") for i in range(len(counts))]

    def items(self, sources: list[Place], targets: list[Place], A_log: Place, A: Place) -> list[Item]:
        """Places, 16 bytes aligned."""
        places: dict[str, Place | None] = {"A_log": A_log, "A": A}
        for (source_name, target_name), source, target in zip(self._names, sources, targets, strict=True):
            places |= {source_name: source, target_name: target}
        return [structure_item(self._kernel, self._grid, 256, self._parameters, places)]
