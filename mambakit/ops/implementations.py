"""Which implementation serves every op on every device, and why: what `mambakit env` prints."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from mambakit.ops._backends import native, nvrtc
from mambakit.ops._backends.launch_list import why_one_by_one
from mambakit.ops.decode import cuda_persistent as persistent
from mambakit.ops.fused_mixer.signature import unavailable
from mambakit.ops.linear.api import MOST_ROWS

OPS = (
    "selective_scan", "causal_conv1d", "rms_norm", "selection_norm", "linear_cross_entropy", "linear", "fused_mixer",
    "decode", "sample",
)  # fmt: skip
# Of these no kernel of the native library is the CPU's own.
_NOT_NATIVE = {
    "linear_cross_entropy": "PyTorch, in chunks",  # matrix products, which are PyTorch's
    "sample": "PyTorch, row by row",
    "fused_mixer": "selective_scan's, causal_conv1d's and PyTorch's products",
}


@dataclass(frozen=True)
class Implementation:
    op: str
    device: str
    serves: str
    remedy: str = ""
    """What would make it faster, where something would."""


def implementations() -> list[Implementation]:
    """One row for each op on the CPU, and on each kind of GPU that is here."""
    cpu = native.describe()
    rows = []
    up_to = {
        "linear": f", up to {MOST_ROWS} rows of packed weights",
        "decode": f", a step in one call, up to {MOST_ROWS} rows",
    }
    for op in OPS:
        if op in _NOT_NATIVE:
            rows.append(Implementation(op, "cpu", _NOT_NATIVE[op]))
        elif cpu["isa"] is None:
            rows.append(Implementation(op, "cpu", "PyTorch (chunked.py)", str(cpu["remedy"])))
        else:
            served = f"C++ ({cpu['isa']}, {cpu['threads']} threads)" + up_to.get(op, "")
            rows.append(Implementation(op, "cpu", served))
    if torch.cuda.is_available():
        rows += [_on_gpu(op) for op in OPS]
    return rows


def _on_gpu(op: str) -> Implementation:
    if op == "fused_mixer":
        why_not = unavailable()
        if why_not is None:
            one_by_one = why_one_by_one()
            remedy = "" if one_by_one is None else f"the host's part is slower, launch by launch: {one_by_one}"
            return Implementation(op, "cuda", "whole layers, a pass as one list of launches; else the ops' own", remedy)
        return Implementation(op, "cuda", _NOT_NATIVE[op], f"whole layers are faster, but {why_not}")
    if op == "selective_scan":
        why_not = nvrtc.available()
        if why_not is None:
            return Implementation(op, "cuda", "CUDA C++ (compiled by NVRTC at the first call)")
        remedy = f"CUDA C++ is several times faster, but {why_not}"
    elif op == "decode":
        why_not = persistent.unavailable(torch.device("cuda", torch.cuda.current_device()))
        if why_not is None:
            served = f"CUDA C++, a step in one kernel, up to {persistent.MOST_ROWS} rows; else Triton, as a CUDA graph"
            return Implementation(op, "cuda", served)
        remedy = f"a step in one kernel is faster, but {why_not}"
    else:
        remedy = ""
    if importlib.util.find_spec("triton") is None:
        return Implementation(op, "cuda", "none", "triton is not installed (it comes with PyTorch's CUDA builds)")
    if op == "linear":
        return Implementation(op, "cuda", "Triton: few rows widen packed weights in registers, many in memory first")
    return Implementation(op, "cuda", "Triton, a step as a CUDA graph" if op == "decode" else "Triton", remedy)
