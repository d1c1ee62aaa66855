"""Which implementation serves every op on every device, and why: what `mambakit env` prints."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

OPS = ("selective_scan", "causal_conv1d", "rms_norm", "linear_cross_entropy")


@dataclass(frozen=True)
class Implementation:
    op: str
    device: str
    serves: str
    remedy: str = ""
    """What would make it faster, where something would."""


def implementations() -> list[Implementation]:
    """One row for each op on the CPU, and on each kind of GPU that is here."""
    rows = [Implementation(op, "cpu", "reference (PyTorch)") for op in OPS]
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            remedy = "triton is not installed: pip install triton (it comes with PyTorch's own CUDA builds)"
            rows += [Implementation(op, "cuda", "none", remedy) for op in OPS]
        else:
            rows += [Implementation(op, "cuda", "Triton") for op in OPS]
    return rows
