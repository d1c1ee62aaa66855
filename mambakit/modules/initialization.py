"""The first values of a mixer's own parameters (Gu & Dao 2023, section 3.6 and appendix E), as mamba_ssm draws them.

They are computed beside the parameter, on its device, whatever it is there: also on meta, and as a sharded tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeSteps:
    """Which step sizes a new layer has: the configuration's ``time_step_*`` fields."""

    low: float = 0.001
    high: float = 0.1
    floor: float = 1e-4
    scale: float = 1.0
    scheme: str = "random"

    @classmethod
    def of(cls, config: Any) -> TimeSteps:
        return cls(
            config.time_step_min, config.time_step_max, config.time_step_floor, config.time_step_scale,
            config.time_step_init_scheme,
        )  # fmt: skip

    def bound(self, rank: int) -> float:
        """The projection's weights are within +- this ("random"), or this ("constant"): the steps' variance is kept."""
        return rank**-0.5 * self.scale

    def bias(self, like: Tensor) -> Tensor:
        """The inverse softplus of steps drawn log-uniformly between ``low`` and ``high``, none below ``floor``; shaped as ``like``."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        low, high = math.log(self.low), math.log(self.high)
        steps = (torch.empty_like(like, dtype=wide).uniform_() * (high - low) + low).exp().clamp(min=self.floor)
        return steps + torch.log(-torch.expm1(-steps))


def initial_a_log(like: Tensor) -> Tensor:
    """ln(1), ..., ln(n) for every channel, as (d, n) ``like`` (S4D-real)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.ones_like(like, dtype=wide).cumsum(-1).log()
