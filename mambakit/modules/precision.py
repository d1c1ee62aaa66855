"""Parameters that stay float32 when a model is cast to a half dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def keep_float32(fn: Callable, t: Tensor) -> Tensor:
    """Apply ``fn`` (a cast, a move) to ``t``, but never cast float32 or float64 to a half dtype.

    A_log, D and the time step's bias set the recurrence's decays: their rounding errors would compound over time. A
    scale of quantised weights multiplies a whole group of them.
    """
    out = fn(t)
    if t.dtype in (torch.float32, torch.float64) and out.dtype in _HALF:
        if out.device.type == "meta":
            return torch.empty_like(t, device="meta", dtype=torch.float32)
        return t.to(out.device, torch.float32)
    return out
