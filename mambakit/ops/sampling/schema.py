"""`mambakit::sample` as a torch.library op. It has no gradient."""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import LIBRARY, define, implement_on_cuda
from mambakit.ops.sampling import cpu, reference


def _fake(logits, uniform, parameters):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


define("sample(Tensor logits, Tensor uniform, Tensor parameters) -> Tensor", reference.sample, _fake)
LIBRARY.impl("sample", cpu.sample, "CPU")
implement_on_cuda("sample", "mambakit.ops.sampling.triton", "sample")
