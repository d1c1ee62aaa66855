"""A layer's parameters as its kernels read them, in one launch (`parameters.cu`).

Under autocast float32 weights are rounded to half at every call, as torch's autocast does at the first call of each of
its contexts. A copy that outlived the call would have to know of every write to the weight: an optimiser's through
``.data``, a captured graph's, FSDP's and functional_call's other tensors. The launch costs a layer a few microseconds
and is never wrong.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch

from mambakit.ops._backends import nvrtc
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
        self._lock = threading.Lock()

    def __call__(self, stream: int, sources: list[int], targets: list[int], A_log: int, A: int) -> None:
        """Addresses, 16 bytes aligned."""
        with self._lock:
            p = self._parameters
            for (source_name, target_name), source, target in zip(self._names, sources, targets, strict=True):
                setattr(p, source_name, source)
                setattr(p, target_name, target)
            p.A_log, p.A = A_log, A
            self._kernel(self._grid, 256, stream, p)
